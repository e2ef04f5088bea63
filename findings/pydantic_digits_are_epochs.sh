#!/usr/bin/env bash
# pydantic 2.14.4: a datetime in ISO 8601's basic form is read as seconds or milliseconds since 1970.
#
# Guess before looking: "20261121" is 21 November 2026, as for `datetime.fromisoformat`, or is refused.
# Seen: a text of digits alone is a count since 1970, and its size decides between seconds and milliseconds. "20261121"
# becomes a day in August 1970, "20261121031100" a day in the year 2612, both without an error. With a `T` and a zone
# the same form is refused, and for `date` the eight digits are refused too.
# Met: time stamps in other programs' logs, where compact dates are common.
#
# Output seen:
#   20261121          pydantic 1970-08-23T12:05:21+00:00         fromisoformat 2026-11-21T00:00:00
#   20261121031100    pydantic 2612-01-19T17:10:31.100000+00:00  fromisoformat refused
#   20261121T031100Z  pydantic refused                           fromisoformat 2026-11-21T03:11:00+00:00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pydantic==2.14.4
"$folder/venv/bin/python" - <<'PYTHON'
from collections.abc import Callable
from datetime import datetime

from pydantic import TypeAdapter

SEEN = {
    "20261121": ("1970-08-23T12:05:21+00:00", "2026-11-21T00:00:00"),
    "20261121031100": ("2612-01-19T17:10:31.100000+00:00", "refused"),
    "20261121T031100Z": ("refused", "2026-11-21T03:11:00+00:00"),
}


def read(parse: Callable[[str], datetime], text: str) -> str:
    try:
        return parse(text).isoformat()
    except ValueError:  # pydantic's ValidationError is one
        return "refused"


for text, expected in SEEN.items():
    found = read(TypeAdapter(datetime).validate_python, text), read(datetime.fromisoformat, text)
    print(f"{text:17} pydantic {found[0]:33} fromisoformat {found[1]}")
    assert found == expected, f"version 2.14.4 read {text} as {expected}"
PYTHON

#!/usr/bin/env bash
# pydantic 2.14.4: a union gives another type to the same JSON, by whether pydantic parsed it or was given it parsed.
#
# Guess before looking: `validate_json(text)` is `validate_python(json.loads(text))`, but faster.
# Seen: with `datetime | str`, `timedelta | str`, `UUID | str`, `Decimal | str` and `bytes | str` the first gives the richer
# type and the second the text, for what `dump_json` of the same adapter has written. So a time does not come back from a
# store that parses its documents itself; and a text such as "P1D" comes back as a timedelta from one that does not.
# (In JSON a text is an exact match for both members, and then the order of the union decides; in Python for `str` alone.)
# Neither way warns, and both are in the default mode.
# Met: giving results back in the type that a handler is annotated to return.
#
# Output seen (value: parsed by pydantic | parsed before):
#   datetime.datetime(2026, 1, 1, 0, 0): datetime | str
#   datetime.timedelta(seconds=1): timedelta | str
#   'P1D': timedelta | str
#   '1.0': Decimal | str
#   '12345678123456781234567812345678': UUID | str
#   b'x': bytes | str
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pydantic==2.14.4
cat >"$folder/run.py" <<'PYTHON'
import json
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

from pydantic import TypeAdapter

CASES = (
    (datetime | str, datetime(2026, 1, 1), "datetime"),
    (timedelta | str, timedelta(seconds=1), "timedelta"),
    (timedelta | str, "P1D", "timedelta"),
    (Decimal | str, "1.0", "Decimal"),
    (UUID | str, "12345678" * 4, "UUID"),
    (bytes | str, b"x", "bytes"),
)
for union, value, rich in CASES:
    adapter = TypeAdapter(union)
    text = adapter.dump_json(value)
    by_pydantic = type(adapter.validate_json(text)).__name__
    before = type(adapter.validate_python(json.loads(text))).__name__
    print(f"{value!r}: {by_pydantic} | {before}")
    assert (by_pydantic, before) == (rich, "str"), "pydantic 2.14.4 gave two types"
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

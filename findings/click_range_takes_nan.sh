#!/usr/bin/env bash
# click 8.5.1: a FloatRange lets NaN through, whatever its bounds, and with clamp too.
#
# Guess before looking: a range refuses what is not between its bounds; pydantic's `Field(ge=0, le=1)` refuses NaN with the same
# comparison turned round, and so does an option of typer. With `clamp=True` the value is at least brought to a bound.
# Seen: FloatRange asks whether the value is below the minimum or above the maximum. NaN is neither, so `nan` on the command line
# reaches the command as a checked value, where each comparison with it is false: a limit never reached, a `timedelta` that
# cannot be made. typer 0.29 refuses it, so moving a command from typer to click loses a check that nobody wrote down.
# Met: asking what keeps `--max-age-hours nan` out of a command.
#
# Output seen:
#   FloatRange(0, 1)               2: refused    nan: nan
#   FloatRange(0, 1, clamp=True)   2: 1          nan: nan
#   typer.Option(min=0, max=1)     2: refused    nan: refused
#   pydantic Field(ge=0, le=1)     2: refused    nan: refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check click==8.5.1 pydantic==2.14.4 typer==0.29.2
cd "$folder"
venv/bin/python -W error - <<'PYTHON'
from typing import Annotated

import click
import typer
from click.testing import CliRunner
from pydantic import Field, TypeAdapter, ValidationError
from typer.testing import CliRunner as TyperRunner


def by_click(kind, text):
    @click.command()
    @click.option("--value", type=kind)
    def command(value):
        click.echo(f"{value:g}")

    result = CliRunner().invoke(command, ["--value", text])
    return result.output.strip() if result.exit_code == 0 else "refused"


def by_typer(text):
    app = typer.Typer()

    @app.command()
    def command(value: Annotated[float, typer.Option(min=0, max=1)]):
        typer.echo(f"{value:g}")

    result = TyperRunner().invoke(app, ["--value", text])
    return result.output.strip() if result.exit_code == 0 else "refused"


def by_pydantic(text):
    try:
        return f"{TypeAdapter(Annotated[float, Field(ge=0, le=1)]).validate_python(text):g}"
    except ValidationError:
        return "refused"


ROWS = {
    "FloatRange(0, 1)": lambda text: by_click(click.FloatRange(0, 1), text),
    "FloatRange(0, 1, clamp=True)": lambda text: by_click(click.FloatRange(0, 1, clamp=True), text),
    "typer.Option(min=0, max=1)": by_typer,
    "pydantic Field(ge=0, le=1)": by_pydantic,
}
seen = {}
for name, check in ROWS.items():
    seen[name] = (check("2"), check("nan"))
    print(f"{name:30} 2: {seen[name][0]:10} nan: {seen[name][1]}")
assert list(seen.values()) == [
    ("refused", "nan"),
    ("1", "nan"),
    ("refused", "refused"),
    ("refused", "refused"),
], "a range refuses NaN now"
PYTHON

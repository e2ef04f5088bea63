"""The command ``agent-state new-adapter``."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from agent_state.cli.output import print_line
from agent_state.errors import AgentStateError, InvalidKeyError

_FILES = {
    "adapter.txt": "agent_state_$name/__init__.py",
    "tests.txt": "tests/test_agent_state_$name.py",
    "readme.txt": "README.md",
    "project.txt": "pyproject.toml",
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_adapter(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The framework: lower-case letters, digits, _.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder; NAME unless given.", show_default=False),
    ] = None,
) -> None:
    """Write the beginning of an adapter for a framework, with its tests, into a new folder.

    It works as it is, and its tests pass: for an imaginary framework that adds texts to pages. No
    file that is there is changed.

    Example: agent-state new-adapter notebook --out adapters/notebook
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise InvalidKeyError(f"{name!r} is no name of a module: lower-case letters, digits and _")
    folder = out if out is not None else Path(name)
    title = "".join(part.capitalize() for part in name.split("_"))
    texts = {}
    for template, path in _FILES.items():
        text = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
        target = folder / Template(path).substitute(name=name)
        if target.exists():
            raise AgentStateError("this file is there already", path=target)
        texts[target] = Template(text).substitute(name=name, title=title)
    for target, text in texts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print_line(str(target))
    print_line(f"Next: pip install -e '{folder}[test]' && pytest {folder}")

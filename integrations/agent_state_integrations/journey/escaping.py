"""Other people's text inside our Markdown and our plain text, where it stays text."""

from __future__ import annotations

import re

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKS = "\\`*_[]<&|~$@"
"""What may begin something inside a line; HTML, entities, tables and addresses among it. The
backslash is first: the others get one."""

_AT_THE_START = re.compile(r"(?:[#+\-=:>]|\d{1,9}[.)](?=\s|$))")
_LINK = re.compile(r"(:)(?=//)|(?<=www)(\.)", re.IGNORECASE)
_ID = re.compile(r"[\w./:@-]+", re.ASCII)
_LEADING = re.compile(r"\s+")


def inline(text: object) -> str:
    """Text for within a line: a table's cell, or a bullet, also at its beginning."""
    return _escaped(plain_line(text))


def code(text: object) -> str:
    """An id, to be copied as it is: a span of code where it can be one."""
    ident = str(text)
    return f"`{ident}`" if _ID.fullmatch(ident) else inline(ident)


def block(text: object) -> str:
    """Text as a quotation of its own, line for line, ended by an empty line."""
    lines: list[str] = []
    before = False
    for line in _lines(str(text)):
        stripped = line.rstrip()
        if before and stripped:
            lines[-1] += "\\"
        lines.append(f"> {_indented(stripped)}" if stripped else ">")
        before = bool(stripped)
    return "\n".join(lines) + "\n\n"


def plain(text: object, indent: str = "    ") -> str:
    """Text for a plain file, each line behind the indent, so that none looks like ours."""
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in _lines(str(text)))


def plain_line(text: object) -> str:
    """Text for within a line of a plain file."""
    return _visible(" ".join(str(text).split())) or "—"


def _lines(text: str) -> list[str]:
    return _visible(text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")


def _visible(text: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _indented(line: str) -> str:
    leading = _LEADING.match(line)
    if leading is None:
        return _escaped(line)
    spaces = "".join(
        "&nbsp;" if space == " " else f"&#{ord(space)};"
        for space in leading[0].replace("\t", "    ")
    )
    return spaces + _escaped(line[leading.end() :])


def _escaped(line: str) -> str:
    escaped = line
    for mark in _MARKS:  # faster here than a regular expression, or str.translate
        if mark in escaped:
            escaped = escaped.replace(mark, f"\\{mark}")
    if "//" in escaped or "www" in escaped.lower():
        escaped = _LINK.sub(lambda found: f"\\{found[0]}", escaped)
    start = _AT_THE_START.match(escaped)
    if start is None:
        return escaped
    at = start.end() - 1
    return f"{escaped[:at]}\\{escaped[at:]}"

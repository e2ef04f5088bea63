"""Analyses a text file without a language model, by pure functions."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable
from typing import TypedDict
from urllib.parse import unquote

_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(\s*(<[^<>]*>|[^()\s<>]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s+[\"'(][^)]*)?\s*\)")
_DEFINITION = re.compile(r" {0,3}\[[^\]^][^\]]*\]:\s*(<[^<>]*>|\S+)")
_ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#|$")

MARKDOWN = (".md", ".markdown")


class Analysis(TypedDict):
    """The analysis of one file, as JSON, since it is sent by mail."""

    file: str
    words: int
    headings: int
    todos: int
    broken_links: list[str]


def analyse(text: str, path: str, exists: Callable[[str], bool]) -> Analysis:
    """Analyse the text of one file. ``path`` and the argument of ``exists`` are relative paths.

    Only Markdown files have headings and links.
    """
    prose = _prose(text) if path.lower().endswith(MARKDOWN) else []
    targets = (_within(target, path) for line in prose for target in _targets(line))
    broken = {target for target in targets if target is not None and not exists(target)}
    return Analysis(
        file=path,
        words=len(text.split()),
        headings=sum(1 for line in prose if _HEADING.match(line)),
        todos=len(_TODO.findall(text)),
        broken_links=sorted(broken),
    )


def _prose(text: str) -> list[str]:
    """The lines outside of fenced code."""
    lines, fence = [], ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if not fence and mark:
            fence = mark[1]
        elif fence and mark and mark[1].startswith(fence) and not line.strip(" `~"):
            fence = ""
        elif not fence:
            lines.append(line)
    return lines


def _targets(line: str) -> Iterable[str]:
    """The targets of the links and images of a line."""
    line = _CODE.sub("", line)
    definition = _DEFINITION.match(line)
    if definition:
        yield definition[1].strip("<>")
    for match in _LINK.finditer(line):
        yield match[1].strip("<>")


def _within(target: str, path: str) -> str | None:
    """The target as a path in the folder; None for a URL, an anchor, or a path outside."""
    if _ELSEWHERE.match(target):
        return None
    bare = unquote(re.split(r"[?#]", target, maxsplit=1)[0])
    folder = "" if bare.startswith("/") else posixpath.dirname(path)
    joined = posixpath.normpath(posixpath.join(folder, bare.lstrip("/")))
    return None if joined == ".." or joined.startswith("../") else joined


def row(found: Analysis) -> str:
    """A file's row in the report."""
    numbers = (found["words"], found["headings"], found["todos"], len(found["broken_links"]))
    return f"| {_cell(found['file'])} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def report(findings: Iterable[Analysis]) -> str:
    """The report in Markdown; the order of the findings does not matter."""
    ordered = sorted(findings, key=lambda found: found["file"])
    words = sum(found["words"] for found in ordered)
    todos = sum(found["todos"] for found in ordered)
    lines = [
        "# What the readers found",
        "",
        f"{len(ordered):,} files, {words:,} words, {todos:,} marks such as TODO.",
        "",
        "| file | words | headings | TODOs | broken links |",
        "|---|---:|---:|---:|---:|",
        *map(row, ordered),
    ]
    broken = [(found["file"], link) for found in ordered for link in found["broken_links"]]
    if broken:
        lines += ["", "## Links that lead nowhere", ""]
        lines += [f"- {_cell(file)}: `{_cell(link)}`" for file, link in broken]
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[str]:
    """The files' rows in a report."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return table[1:]


def _cell(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|")
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in escaped)

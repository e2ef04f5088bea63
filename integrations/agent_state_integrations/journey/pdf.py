"""An export as PDF: the text of the export on pages, with headings, an outline and links.

The text is set in a font of the machine that has most of the world's letters, such as DejaVu Sans
or Noto Sans. A character that the font does not have is printed as ``[U+1F600]``, so that none is
lost without a trace; without such a font every character beyond Latin-1 is. Scripts are set
from left to right, unshaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from agent_state.errors import StateValidationError, needs_extra

with needs_extra("pdf", "fpdf"):
    from fpdf import FPDF
    from fpdf.enums import XPos, YPos
    from fpdf.errors import FPDFException
    from fpdf.fonts import TTFFont

_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf")
_RULE = re.compile(r"(-+|=+)")
_MESSAGE = re.compile(r"(\d+)\. \[")
_REFERENCE = re.compile(r"(?:message|triggered by) (\d+) \(")
_SIZE, _HEADING, _TITLE = 10, 13, 18
_MARGIN = 18


def find_font() -> Path | None:
    """The first font of this machine that most texts can be set in; None without one."""
    for name in _FONTS:
        for folder in _FOLDERS:
            found = sorted(Path(folder).rglob(name)) if Path(folder).is_dir() else []
            if found:
                return found[0]
    return None


def render_pdf(text: str, made_at: datetime, *, font: Path | None = None) -> bytes:
    """The pages of a text export. The same text and time and font give the same bytes.

    ``font``: a TrueType font; None for ``find_font``. Raises ``StateValidationError`` for a file
    that is no such font. It takes a while and blocks.
    """
    return bytes(_Pages(font or find_font(), made_at).of(text).output())


class _Pages:
    """The document while it is set."""

    def __init__(self, font: Path | None, made_at: datetime) -> None:
        self._pdf = FPDF(format="A4")
        self._pdf.set_creation_date(made_at)
        self._pdf.set_title("Conversation journey")
        self._pdf.set_margin(_MARGIN)
        self._pdf.set_auto_page_break(auto=True, margin=_MARGIN)
        self._known: frozenset[int] | None = None
        if font is None:
            self._family = "Helvetica"
        else:
            self._family = "text"
            try:
                self._pdf.add_font("text", "", str(font))
            except (OSError, FPDFException, ValueError) as error:
                raise StateValidationError(f"{font} is no font that can be used") from error
            except Exception as error:  # fonttools has errors of its own for what is no font
                raise StateValidationError(f"{font} is no font that can be used") from error
            added = self._pdf.fonts["text"]
            self._known = frozenset(added.cmap) if isinstance(added, TTFFont) else None
        self._links: dict[int, int] = {}

    def of(self, text: str) -> FPDF:
        """Set the text."""
        self._pdf.add_page()
        for line, level in _lines(text):
            if level == 2:
                self._set(line, _TITLE, below=3)
            elif level == 1:
                self._pdf.start_section(self._printable(line))
                self._set(line, _HEADING, above=4, below=2)
            else:
                self._set_line(line)
        return self._pdf

    def _set_line(self, line: str) -> None:
        begins = _MESSAGE.match(line)
        if begins:
            self._pdf.set_link(self._link(int(begins[1])), page=-1, y=self._pdf.get_y())
        refers = None if line.startswith("    ") else _REFERENCE.search(line)
        self._set(line, _SIZE, link=self._link(int(refers[1])) if refers else 0)

    def _link(self, number: int) -> int:
        if number not in self._links:
            # A message that is not printed leads to the first page.
            self._links[number] = self._pdf.add_link(page=1)
        return self._links[number]

    def _set(self, line: str, size: int, *, above: int = 0, below: int = 0, link: int = 0) -> None:
        indent = 6 if line.startswith("    ") else 0
        if above:
            self._pdf.ln(above)
        self._pdf.set_font(self._family, size=size)
        self._pdf.set_text_color(0, 0, 160 if link else 0)
        self._pdf.set_x(self._pdf.l_margin + indent)
        self._pdf.multi_cell(
            0,
            size * 0.5,
            self._printable(line.strip()) or " ",
            align="L",
            link=link or "",
            new_x=XPos.LMARGIN,
            new_y=YPos.NEXT,
        )
        if below:
            self._pdf.ln(below)

    def _printable(self, text: str) -> str:
        return "".join(
            char if self._has(char) else f"[U+{ord(char):04X}]" for char in text.expandtabs(4)
        )

    def _has(self, char: str) -> bool:
        return ord(char) in self._known if self._known is not None else ord(char) < 256


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines; the level is 2 for the title, 1 for a heading.

    What was said is indented, so that it can be neither.
    """
    lines = text.split("\n")
    for place, line in enumerate(lines):
        below = lines[place + 1] if place + 1 < len(lines) else ""
        if line and len(below) == len(line) and _RULE.fullmatch(below):
            yield line, 2 if below[0] == "=" else 1
        elif not (line and place and len(line) == len(lines[place - 1]) and _RULE.fullmatch(line)):
            yield line, 0

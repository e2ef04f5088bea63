"""Write the pictures of the README from the real programs: ``python -m tests.demo.pictures``."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 120


def run(*arguments: str, folder: Path) -> str:
    """What a command prints on a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    program = [sys.executable, "-m", "agent_state", *arguments]
    with subprocess.Popen(program, cwd=folder, stdout=follower, env=environment):
        os.close(follower)
        printed = b""
        while chunk := _read(leader):
            printed += chunk
    os.close(leader)
    lines = printed.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\x1b[2K")[2] for line in lines)  # a bar is drawn over itself


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the last program has closed the terminal
        return b""


def draw(name: str, command: str, printed: str) -> None:
    """Write a picture of a terminal. It names no fonts of other hosts."""
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text.from_ansi(f"$ {command}\n{printed}"))
    svg = console.export_svg(title="agent-state")
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    lines = (line.rstrip() for line in svg.splitlines())
    (IMAGES / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run the demo, and look at what it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts")
        texts.mkdir()
        for path in sorted((ROOT / "docs").glob("*.md")):
            (texts / path.name).write_bytes(path.read_bytes())
        state = Path(folder, "state")
        with ThreadPoolExecutor() as threads:
            running = threads.submit(
                run, "demo", "--kills", "2", "--state", str(state), folder=texts
            )
            while len(list(state.glob("tasks/*/*.json"))) < 10:
                time.sleep(0.05)
            busy = run("top", "--once", "--state", "state", folder=Path(folder))
            printed = running.result()
        draw("top", "agent-state top --once", busy.replace(folder, "/tmp"))
        lines = printed.replace(folder, "/tmp").splitlines()
        end = next(n for n, line in enumerate(lines) if "nothing was lost" in line)
        draw("demo", "agent-state demo --kills 2", "\n".join(lines[: end + 1]))


if __name__ == "__main__":
    main()

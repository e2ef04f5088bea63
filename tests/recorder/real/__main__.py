"""Drives the real tools against a model server on loopback, and imports what they wrote.

    python -m tests.recorder.real [TOOL …] [--keep DIR]

Installs the pinned packages with npm into a temporary folder. For each tool it shows what the
importer made of its sessions, and what changed against ``EXPECTED``; exit 1 when something did. A
new version of a tool is looked at by changing its pin in ``tools.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from agent_state_integrations.recorder.importers import import_logs
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder.real.model_server import INPUT_TOKENS, OUTPUT_TOKENS, ModelServer
from tests.recorder.real.tools import TOOLS, RealTool

Seen = dict[str, int]

EXPECTED: dict[str, Seen] = {
    "claude-code": {
        "User": 9, "Agent": 35, "Tool": 5, "Prompt": 2, "Notification": 1, "Command": 4,
        "Synthetic": 1, "System": 2, "responses": 15, "failed commands": 1, "children": 1,
    },
    "codex": {
        "User": 5, "Agent": 10, "Tool": 3, "Prompt": 1, "Notification": 1, "System": 1,
        "responses": 7, "failed commands": 1, "children": 2,
    },
    "gemini": {
        "User": 4, "Agent": 7, "Tool": 2, "Prompt": 2, "responses": 7, "failed commands": 1,
        "children": 1,
    },
    "qwen": {
        "User": 5, "Agent": 7, "Tool": 3, "Prompt": 1, "System": 1, "responses": 7,
        "failed commands": 1, "children": 1,
    },
    "opencode": {
        "User": 5, "Agent": 10, "Tool": 3, "Prompt": 1, "Synthetic": 1, "responses": 7,
        "failed commands": 1, "children": 2,
    },
    "pi": {
        "User": 4, "Agent": 4, "Tool": 2, "Synthetic": 1, "responses": 4, "failed commands": 1,
        "children": 1,
    },
}  # fmt: skip
"""What the pinned versions give: messages by role, responses with their tokens, conversations with
a parent."""


def seen_of(tool: RealTool, home: Path) -> Seen:
    """What the importer finds in the sessions of a tool."""
    state = home / "imported"
    with RecordWriter(state) as writer:
        report = import_logs([home / tool.written], writer)
        again = import_logs([home / tool.written], writer)
    assert report.ok, [file.error for file in report.files if file.error]
    assert again.recorded == 0
    records = [record for _, record in read_records(state)]
    roles = Counter(record["SpeakerRole"] for record in records)
    usages = [usage for record in records if (usage := record["Metadata"].get("usage"))]
    for usage in usages:
        given = usage.get("input_tokens", 0) + usage.get("cache_read_tokens", 0)
        assert given in (INPUT_TOKENS, INPUT_TOKENS + usage["cache_read_tokens"])
        assert usage["output_tokens"] == OUTPUT_TOKENS
    results = [
        result for record in records for result in record.get("Content", {}).get("tool_results", [])
    ]
    children = {record["ContextId"] for record in records if "parent_context" in record["Metadata"]}
    return {
        **roles,
        "responses": len(usages),
        "failed commands": sum(bool(each.get("about", {}).get("exit_code")) for each in results),
        "children": len(children),
    }


def main() -> int:
    """Drive the tools that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help="by default all of them")
    parser.add_argument("--keep", type=Path, help="install and write here, and keep it")
    asked = parser.parse_args()
    wanted = [tool for tool in TOOLS if tool.name in asked.tools or not asked.tools]
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        packages = [f"{tool.package}@{tool.version}" for tool in wanted]
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
        subprocess.run([*command, *packages], check=True)
        changed = False
        for tool in wanted:
            with ModelServer() as server:
                tool.drive(folder, folder / "homes" / tool.name, server.url)
            seen = seen_of(tool, folder / "homes" / tool.name)
            expected = EXPECTED[tool.name]
            sys.stdout.write(f"{tool.name} {tool.version}: {seen}\n")
            sys.stdout.flush()
            for name in sorted(seen.keys() | expected.keys()):
                if seen.get(name, 0) != expected.get(name, 0):
                    changed = True
                    was = expected.get(name, 0)
                    sys.stdout.write(f"  {name}: {seen.get(name, 0)}, was {was}\n")
    return int(changed)


sys.exit(main())

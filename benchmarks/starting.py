"""Starting: what ``import agent_state`` costs, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

EXTRAS = ("typer", "rich", "redis", "fastapi", "uvicorn", "zmq", "pyarrow", "langgraph", "pytest")

_PROGRAM = """
import json, sys, time
began = time.perf_counter()
import agent_state
seconds = time.perf_counter() - began
print(json.dumps([seconds, sorted(sys.modules)]))
"""


def importing(setting: Setting) -> list[Row]:
    """The import alone, after the interpreter has started; no extra may come with it."""
    took = []
    for run in range(setting.runs + 1):
        answer = subprocess.run(  # noqa: S603  # our own interpreter and program
            [sys.executable, "-c", _PROGRAM], capture_output=True, check=True, text=True
        )
        seconds, modules = json.loads(answer.stdout)
        extras = set(EXTRAS).intersection(modules)
        assert not extras, f"`import agent_state` loads {extras}"
        if run:  # the first compiles what is not compiled yet
            took.append(seconds * 1e3)
    return [Row("import agent_state", took, "ms", at_most(250), "no extra loaded")]

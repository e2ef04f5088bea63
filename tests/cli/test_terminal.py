"""What the commands print where: on a terminal, in few characters, and where nobody reads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from agent_state import StatePersistenceManager
from agent_state.cli.output import LogFormatter
from tests.deadlines import until

COMMAND = (sys.executable, "-m", "agent_state")
NAMES = ["\u009b31mred", "\u202egnp.exe", "\x1b]0;title\x07", "\u2066left\u2069", "\x7f\x85\u200f"]
RAW = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
async def named(tmp_path: Path) -> Path:
    """A directory in which every kind of text holds characters that move a terminal's cursor."""
    name = "".join(NAMES)
    async with StatePersistenceManager(tmp_path / "state") as manager:
        state = {"agent_id": "a0", "agent_name": name, "status": name, name: [name]}
        await manager.save_agent_state("a0", state)
        task = {"task_id": name, "name": name, "status": name, "attempts": 0}
        await manager.save("tasks", ("a0", name), task)
        await manager.append("system", "events", {"text": name})
    return tmp_path / "state"


def on_terminal(*args: object) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    command = [*COMMAND, *map(str, args)]
    with subprocess.Popen(command, stdout=theirs, stdin=theirs, stderr=-3, env=env) as process:
        os.close(theirs)
        printed = b""
        with suppress(OSError):  # EIO: the other end is closed
            while some := os.read(ours, 65536):
                printed += some
    os.close(ours)
    assert process.returncode in (0, 1), printed
    return printed.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["ls", "ls tasks", "show a0", "show a0 --json"])
def test_no_text_of_a_state_moves_a_terminals_cursor(named: Path, command: str) -> None:
    plain = COLOURS.sub("", on_terminal(*command.split(), "--state", named))

    assert "u202e" in plain or (command == "ls" and "x9b" in plain)
    assert RAW.search(plain) is None, ascii(plain)
    assert "\x1b" not in plain


def test_json_with_escapes_is_the_same_json(named: Path) -> None:
    printed = subprocess.run(
        [*COMMAND, "show", "a0", "--json", "--state", named], capture_output=True, check=True
    ).stdout.decode()

    assert json.loads(printed)["agent"]["state"]["agent_name"] == "".join(NAMES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["ls", "show zoë", "ls --json"])
async def test_a_command_prints_in_any_encoding(
    tmp_path: Path, encoding: str, command: str
) -> None:
    async with StatePersistenceManager(tmp_path / "state") as manager:
        state = {"agent_id": "zoë", "agent_type": "😀 → π", "status": "łazy" * 40}
        await manager.save_agent_state("zoë", state)

    done = subprocess.run(
        [*COMMAND, *command.split(), "--state", tmp_path / "state"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )

    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    if "--json" in command:
        assert json.loads(text)["agents"][0]["agent_id"] == "zoë"
    elif command.startswith(("ls", "show")):
        assert ("zo\\xeb" if encoding == "ascii" else "zoë") in text


# -- where nobody reads ------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


REDIRECTIONS = {
    "closed": "exec {command} >&- 2>&-",
    "all closed": "exec {command} <&- >&- 2>&-",
    "full": "exec {command} >/dev/full 2>/dev/full",
    "a pipe without a reader": "{command} 2>&1 | true",
    "a reader that leaves": "{command} 2>&1 | head -c 1",
}


@pytest.mark.parametrize("redirection", REDIRECTIONS)
async def test_a_server_answers_and_ends_though_nobody_reads_its_output(
    tmp_path: Path, redirection: str
) -> None:
    port = free_port()
    (tmp_path / "state").mkdir()
    serve = f"{sys.executable} -m agent_state serve {tmp_path / 'state'} --port {port}"
    script = REDIRECTIONS[redirection].format(command=f"{serve}")
    if "|" in script:
        script = script.replace(serve, f"( echo $BASHPID > {tmp_path}/pid; exec {serve} )")
    server = await asyncio.create_subprocess_exec("bash", "-c", script)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            async with asyncio.timeout(60):
                while True:
                    with suppress(httpx.TransportError):
                        answer = await client.get("/ready")
                        if answer.status_code == 200:
                            break
                        assert answer.json()["code"] == "starting"
                    assert server.returncode is None or "|" in script
                    await asyncio.sleep(0.05)
            made = await client.post("/api/agents", json={"agent_id": "a", "agent_type": "t"})
            assert made.status_code == 201
        pid = int((tmp_path / "pid").read_text()) if "|" in script else server.pid
        os.kill(pid, signal.SIGTERM)
        async with asyncio.timeout(60):
            await server.wait()
        await until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
    assert json.loads((tmp_path / "state/agents/a.json").read_text())["agent_id"] == "a"


# -- where the reader leaves, or the disk is full -----------------------------------------------

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
UNBUFFERED = {**BUFFERED, "PYTHONUNBUFFERED": "1"}
COMMANDS = ["ls", "tasks ls", "--version"]


def in_shell(script: str, command: str, env: dict[str, str]) -> tuple[int, str]:
    """The exit code of a script's last command, and what is printed on stderr."""
    script = script.replace("COMMAND", f"{sys.executable} -m agent_state {command}")
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=env
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("env", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_a_command_whose_reader_has_left_says_nothing(
    named: Path, command: str, env: dict[str, str]
) -> None:
    env = {**env, "AGENT_STATE_DIR": str(named)}
    code, errors = in_shell("exec 3> >(true); wait $!; COMMAND >&3", command, env)

    assert (code, errors) == (2 if "PYTHONUNBUFFERED" in env else 0, "")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("env", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_output_that_cannot_be_written_is_an_error(
    named: Path, command: str, env: dict[str, str]
) -> None:
    env = {**env, "AGENT_STATE_DIR": str(named)}
    code, errors = in_shell("COMMAND > /dev/full", command, env)

    assert (code, errors) == (2, "agent-state: [Errno 28] No space left on device\n")


def test_logged_text_moves_no_cursor_and_makes_no_line() -> None:
    name = "".join(NAMES) + "\nagent-state: all is well"
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s is dead", (name,), None)
    shown = LogFormatter().format(record)

    assert RAW.search(shown) is None
    assert shown.splitlines()[1] == "  agent-state: all is well is dead"

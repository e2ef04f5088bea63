"""The daemon and the server when nobody reads their output, and when they are started twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from tests.deadlines import SECONDS, until_in_thread

COMMAND = (sys.executable, "-m", "agent_state")


@contextmanager
def running(*args: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A command in a process of its own, and the words that it printed when it was ready."""
    with subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = ""
            while not line.startswith(("recording", "http")):
                line = process.stdout.readline()
                assert line or process.poll() is None, process.stderr and process.stderr.read()
            yield process, line.split()
        finally:
            if process.poll() is None:
                process.kill()


def daemon(state: Path) -> tuple[str, ...]:
    ends = ("--pull", "tcp://127.0.0.1:*", "--ack", "tcp://127.0.0.1:*")
    return ("record", "daemon", "--state", str(state), *ends)


def endpoints(words: list[str]) -> tuple[str, str]:
    return words[words.index("pull") + 1].rstrip(","), words[words.index("ack") + 1]


def recorded(state: Path) -> list[str]:
    log = state / "record/current.jsonl"
    lines = log.read_bytes().splitlines() if log.exists() else []
    return [json.loads(line)["Id"] for line in lines]


def test_a_daemon_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    with running(*daemon(tmp_path)) as (process, words), zmq.Context() as context:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()  # what it has to say now has no reader
        with context.socket(zmq.PUSH) as push, context.socket(zmq.DEALER) as ask:
            push.connect(endpoints(words)[0])
            ask.connect(endpoints(words)[1])
            for number in range(3):
                push.send(b"no message")
                ask.send_multipart([b"what", b"is", b"this"])
                push.send_json({"message_id": f"m{number}", "sender_id": "a", "content": "hello"})
                until_in_thread(lambda: recorded(tmp_path)[-1:] == [f"m{number}"])  # noqa: B023
        process.terminate()
        assert process.wait() == 0
    assert [each for each in recorded(tmp_path) if each.startswith("m")] == ["m0", "m1", "m2"]


_SIGNALLED = """
import signal, sys, threading
from agent_state.cli import main

def strike():
    sys.stdin.readline()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=strike, daemon=True).start()
main()
"""


def test_a_signal_ends_a_daemon_though_it_does_not_interrupt_its_wait(tmp_path: Path) -> None:
    """One that another thread gets; as one that comes just before the wait begins."""
    command = [sys.executable, "-c", _SIGNALLED, *daemon(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline().startswith("recording")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def test_a_second_daemon_at_the_same_endpoint_is_refused_by_name(tmp_path: Path) -> None:
    with running(*daemon(tmp_path)) as (_, words):
        pull, _ = endpoints(words)
        second = subprocess.run(
            [*COMMAND, "record", "daemon", "--state", tmp_path, "--pull", pull],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2
        assert pull in second.stderr
        assert second.stderr.count("\n") == 1
        with running(*daemon(tmp_path)):  # with endpoints of its own it records beside it
            pass


@pytest.mark.parametrize("what", ["directory", "address"])
def test_a_second_server_is_refused_by_name(tmp_path: Path, what: str) -> None:
    for name in ("state", "other"):
        (tmp_path / name).mkdir()
    with running("serve", str(tmp_path / "state"), "--port", "0") as (first, words):
        port = words[0].rpartition(":")[2]
        where = tmp_path / "state" if what == "directory" else tmp_path / "other"
        second = subprocess.run(
            [*COMMAND, "serve", where, "--port", "0" if what == "directory" else port],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2
        named = str(first.pid) if what == "directory" else f"127.0.0.1:{port}"
        assert named in second.stderr
        assert second.stderr.count("\n") == 1

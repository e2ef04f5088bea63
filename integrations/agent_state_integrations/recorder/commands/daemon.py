"""``agent-state record daemon``: the process that records what agents send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli.options import StateOption
from agent_state.cli.output import announce, print_error
from agent_state.errors import AgentStateError

if TYPE_CHECKING:
    from agent_state_integrations.recorder.network.daemon import RecorderDaemon

_LOST = 1
_PULL, _ACK = "tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"
_FRONT, _BACK = "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"


class Durability(StrEnum):
    """When a message counts as recorded."""

    fsync = "fsync"
    os = "os"


def daemon(
    *,
    state: StateOption = Path("state"),
    pull: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Where to take messages without receipts.")
    ] = _PULL,
    ack: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Where to take messages and give receipts.")
    ] = _ACK,
    subscribe: Annotated[
        str | None,
        typer.Option(
            metavar="ENDPOINT",
            help="Record what this broker passes on, too: its back, such as tcp://127.0.0.1:5556.",
            show_default=False,
        ),
    ] = None,
    broker: Annotated[
        bool, typer.Option("--broker", help="Be the broker oneself, and record all it passes on.")
    ] = False,
    front: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="With --broker: where agents publish.")
    ] = _FRONT,
    back: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="With --broker: where agents subscribe.")
    ] = _BACK,
    rotate_size: Annotated[
        int,
        typer.Option(
            metavar="MIB", help="The live log becomes a segment at this size.", min=1, max=1024
        ),
    ] = 64,
    dedupe_content: Annotated[
        bool,
        typer.Option(
            "--dedupe-content",
            help="The same words of the same speaker in the same context are a repeat, too.",
        ),
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="If anything came.", min=1.0)
    ] = 300.0,
    durability: Annotated[
        Durability, typer.Option(help="os: a message may be lost in a power cut.")
    ] = Durability.fsync,
    rules: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="How to enrich: standard, legacy, legacy-broker or a file."
        ),
    ] = "standard",
    redact: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Further rules of secrets, such as a gitleaks.toml.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Record what agents send, until SIGTERM or Ctrl-C.

    Prints one line with its endpoints when it is ready. Several daemons may record into one
    directory, on endpoints of their own. The endpoints are open to all who can reach them:
    leave them on this machine. Exit 1 when something that was received could not be stored.

    Example: agent-state record daemon --pull tcp://127.0.0.1:5557
    """
    # The extra is asked for here, and only this command pays for it.
    from agent_state_integrations.recorder.network.daemon import Broker, RecorderDaemon
    from agent_state_integrations.recorder.network.wire import is_local
    from agent_state_integrations.recorder.redact import SecretRedactor
    from agent_state_integrations.recorder.rules import Rules
    from agent_state_integrations.recorder.writer import RecordWriter

    if broker and subscribe is not None:
        raise typer.BadParameter("--broker is itself what would be subscribed to")
    with ExitStack() as stack:
        endpoints = {}
        if broker:
            passing_on = stack.enter_context(Broker(front, back))
            subscribe = passing_on.back
            endpoints = {"front": passing_on.front, "back": passing_on.back}
        elif subscribe is not None:
            endpoints = {"subscribed": subscribe}
        writer = RecordWriter(
            state,
            durability="fsync" if durability is Durability.fsync else "os",
            rules=Rules.load(rules),
            redactor=SecretRedactor.default(redact),
            rotate_bytes=rotate_size * 1024 * 1024,
            dedupe_content=dedupe_content,
        )
        recording = stack.enter_context(
            RecorderDaemon(
                writer,
                pull=pull,
                ack=ack,
                subscribe=subscribe,
                checkpoint_seconds=checkpoint_every,
                notify=print_error,
            )
        )
        stack.enter_context(writer)
        stack.enter_context(_stopped_by_signals(recording))
        endpoints = {"pull": recording.pull, "ack": recording.ack, **endpoints}
        for endpoint in endpoints.values():
            if not is_local(endpoint) and endpoint != subscribe:
                print_error(f"{endpoint} is open to other machines, without authentication")
        said = ", ".join(f"{name} {endpoint}" for name, endpoint in endpoints.items())
        announce(f"recording into {state}: {said}")
        try:
            recording.run()
        except AgentStateError as error:  # the daemon has said what
            raise typer.Exit(_LOST) from error


@contextmanager
def _stopped_by_signals(daemon: RecorderDaemon) -> Iterator[None]:
    """Let signals end ``run``, also one that comes just before it waits, or in another thread.

    Only the first kind interrupts a wait; so the interpreter wakes it by the daemon's own socket.
    """
    before = {
        number: signal.signal(number, lambda *_: daemon.stop())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    woken = signal.set_wakeup_fd(daemon.wake_fd)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)

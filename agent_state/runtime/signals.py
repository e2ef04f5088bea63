"""SIGTERM and SIGINT, which end the block of ``async with runtime`` in good order."""

from __future__ import annotations

import asyncio
import signal
import threading
from functools import partial
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STANDARD = (signal.SIG_DFL, signal.default_int_handler)


class StopSignals:
    """Cancels the task that entered a block when the first signal comes.

    A second signal does what it does by default: it ends the process. A handler that the program
    has set itself is left alone, and so are signals outside of the main thread.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._former: dict[int, Any] = {}
        """The handlers of the signals that are caught, as they were before."""
        self._received = False
        self._ready = False
        self._cancelled = False

    def catch(self) -> None:
        """Catch the signals for the running task, until ``release``."""
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._received = self._ready = self._cancelled = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            former = signal.getsignal(number)
            if _is_free(former):
                try:
                    self._loop.add_signal_handler(number, self._receive)
                except (NotImplementedError, RuntimeError):
                    return  # Windows, or a loop that has no signals
                self._former[number] = former

    def interrupt_if_received(self) -> None:
        """From now on a signal cancels the task: at once, if one came before."""
        self._ready = True
        if self._received:
            self._interrupt()

    def leave(self, kind: type[BaseException] | None) -> bool:
        """End the block, which ended by an error of this kind; return whether a signal ended it.

        From now on a first signal is received, and cancels nothing.
        """
        self._ready = False
        if not self._cancelled or self._task is None:
            return False
        alone = self._task.uncancel() == 0  # else somebody else cancelled it, too
        return alone and kind is not None and issubclass(kind, asyncio.CancelledError)

    def release(self) -> None:
        """Leave the signals as they were."""
        former = dict(self._former)
        self._forget()
        for number, handler in former.items():
            signal.signal(number, handler)
        self._task = self._loop = None

    def _receive(self) -> None:
        self._received = True
        self._forget()
        if self._ready:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def _forget(self) -> None:
        caught, self._former = self._former, {}
        for number in caught:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_signal_handler(number)


def _is_free(handler: Any) -> bool:
    """Whether this is no handler of the program's own; that of ``asyncio.run`` is none."""
    if handler in _STANDARD:
        return True
    inner = handler.func if isinstance(handler, partial) else handler
    return isinstance(getattr(inner, "__self__", None), asyncio.Runner)

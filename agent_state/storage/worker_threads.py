"""Threads that take work from a queue, and that a Ctrl-C leaves whole."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar

T = TypeVar("T")
Args = ParamSpec("Args")

Job: TypeAlias = Callable[[], None]


class WorkerThreads(Executor):
    """At most ``limit`` threads, named after ``name``; each is started when it is needed.

    ``asyncio`` answers a second Ctrl-C by raising ``KeyboardInterrupt`` between any two
    instructions of the main thread. In ``ThreadPoolExecutor.submit`` that can leave a lock locked
    that is written in Python (``threading.Semaphore``), and the next ``submit`` waits for ever.
    ``queue.SimpleQueue`` is written in C: an item is put into it, or not.

    Jobs are put by one thread at a time: that of the event loop.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._unfinished: set[Job] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        weakref.finalize(self, self._jobs.put, None)  # of one that nobody closed
        _open.add(self)

    def put(self, job: Job) -> None:
        """Have a job run, which raises nothing. Raises ``RuntimeError`` after ``shutdown``."""
        if self._closed:
            raise RuntimeError("the threads have ended")
        self._unfinished.add(job)
        self._jobs.put(job)
        if len(self._threads) < min(self._limit, len(self._unfinished)):
            thread = threading.Thread(
                target=_work,
                args=(self._jobs, self._unfinished),
                name=f"{self._name}-{len(self._threads)}",
                daemon=True,  # they end by ``_close_all``, after the threads of the program
            )
            thread.start()
            self._threads.append(thread)

    def submit(
        self, fn: Callable[Args, T], /, *args: Args.args, **kwargs: Args.kwargs
    ) -> Future[T]:
        """Run ``fn`` as ``ThreadPoolExecutor`` does, for libraries that take an executor."""
        outcome: Future[T] = Future()

        def job() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  # raised where it is awaited
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        submitted.add(outcome)
        self.put(job)
        return outcome

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, and let the threads end once they have done what they have.

        Blocks until then if ``wait``. With ``cancel_futures`` what has not begun is dropped.
        """
        self._closed = True
        if cancel_futures:
            with contextlib.suppress(Empty):
                while True:
                    self._jobs.get_nowait()
        self._jobs.put(None)
        if wait:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()


def _work(jobs: SimpleQueue[Job | None], unfinished: set[Job]) -> None:
    while (job := jobs.get()) is not None:
        job()
        unfinished.discard(job)
        del job
    jobs.put(None)  # for the next thread


_open: weakref.WeakSet[WorkerThreads] = weakref.WeakSet()
submitted: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
"""The outcomes of what libraries submitted."""


@atexit.register
def _close_all() -> None:
    for threads in list(_open):
        threads.shutdown()

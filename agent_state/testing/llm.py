"""A language model that answers as the test says, for agents that are tested without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Self, TypeAlias

import orjson

from agent_state.clock import Clock, SystemClock

Message: TypeAlias = dict[str, Any]
"""A message in the form of OpenAI's chat completions."""
Answer: TypeAlias = Message | BaseException | Callable[[Sequence[Message]], Message]


class ScriptEndedError(AssertionError):
    """The model was called more often than the test has answers for."""


class FakeLLM:
    """Answers each call with the next answer of its script, and remembers what it was asked.

    ::

        llm = FakeLLM().call_tool("add", a=1, b=2).reply("The sum is 3.")
        message = await llm([{"role": "user", "content": "What is 1 + 2?"}])

    Answers are messages of the role ``assistant`` as OpenAI's chat completions have them; a call
    of a tool has the id ``call_1``, ``call_2`` and so on. It stands for a service outside of the
    process: a restart does not begin its script again. ``clock`` is asked to wait for answers that
    take time.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or SystemClock()
        self._script: list[tuple[Answer, float]] = []
        self._call_ids = count(1)
        self.calls: list[list[Message]] = []
        """The messages of each call so far, as they were given."""

    @property
    def left(self) -> int:
        """The number of answers that no call has taken yet."""
        return len(self._script)

    def reply(self, text: str, *, seconds: float = 0.0) -> Self:
        """Answer one call with a text, after so many seconds of the clock."""
        return self._add({"role": "assistant", "content": text}, seconds)

    def call_tool(self, name: str, /, *, seconds: float = 0.0, **arguments: Any) -> Self:
        """Answer one call with a call of a tool."""
        function = {"name": name, "arguments": orjson.dumps(arguments).decode()}
        call = {"id": f"call_{next(self._call_ids)}", "type": "function", "function": function}
        return self._add({"role": "assistant", "content": None, "tool_calls": [call]}, seconds)

    def fail(self, error: BaseException, *, seconds: float = 0.0) -> Self:
        """Raise an error for one call."""
        return self._add(error, seconds)

    def answer(
        self, function: Callable[[Sequence[Message]], Message], *, seconds: float = 0.0
    ) -> Self:
        """Answer one call with what a function makes of its messages."""
        return self._add(function, seconds)

    def _add(self, answer: Answer, seconds: float) -> Self:
        self._script.append((answer, seconds))
        return self

    async def __call__(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Message:
        """Return the next answer; ``options``, such as a model's name, change nothing.

        Raises ``ScriptEndedError`` when there is none, and what ``fail`` was given.
        """
        answer, seconds, given = self._take(messages)
        if seconds:
            await self._clock.sleep(seconds)
        return _made(answer, given)

    def complete(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Message:
        """Return the next answer at once, for code that does not await. Raises as the call."""
        answer, _, given = self._take(messages)
        return _made(answer, given)

    def _take(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[Answer, float, Sequence[Message]]:
        given = orjson.loads(orjson.dumps([dict(message) for message in messages]))
        self.calls.append(given)
        if not self._script:
            last = given[-1] if given else None
            raise ScriptEndedError(
                f"call {len(self.calls)} of the model has no answer; it ends with {last!r:.200}"
            )
        return *self._script.pop(0), given


def _made(answer: Answer, messages: Sequence[Message]) -> Message:
    if isinstance(answer, BaseException):
        raise answer
    return answer(messages) if callable(answer) else dict(answer)

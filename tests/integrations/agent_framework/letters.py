"""A workflow whose two writers make a draft longer in turns, and types of an application."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from agent_framework import Executor, WorkflowBuilder, WorkflowContext, handler
from pydantic import BaseModel

from agent_state_integrations.agent_framework import AgentStateCheckpointStorage

NAME = "letters"
STEPS = 6


class Colour(Enum):
    RED = "red"


@dataclass
class Draft:
    text: str
    colour: Colour = Colour.RED
    tags: set[str] = field(default_factory=set)


@dataclass(slots=True, frozen=True)
class Mark:
    number: int
    parts: tuple[int, ...] = ()


class Letter(BaseModel):
    to: str
    draft: Any = None


class Secret:
    """Not allowed anywhere."""


class Chained:
    """Restored by a function of its own."""

    def __reduce__(self) -> Any:
        return sorted, ([],)


class Sealed:
    """Restored by calling it, and refused by ``copy``."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not copied")

    def __reduce__(self) -> Any:
        return Sealed, ((self.text,) if self.text else ())


ALLOWED = [
    f"{__name__}:{name}" for name in ("Chained", "Colour", "Draft", "Letter", "Mark", "Sealed")
]


class Writer(Executor):
    """Writes a draft a step further, until it has enough steps."""

    @handler
    async def write(self, draft: Draft, context: WorkflowContext[Draft, str]) -> None:
        longer = Draft(f"{draft.text}.", draft.colour, {*draft.tags, str(len(draft.text))})
        context.set_state("letter", Letter(to="ann", draft=longer))
        if len(longer.text) < STEPS:
            await context.send_message(longer, target_id="b" if self.id == "a" else "a")
        else:
            await context.yield_output(longer.text)


def workflow_with(storage: Any) -> Any:
    first, second = Writer("a"), Writer("b")
    builder = WorkflowBuilder(start_executor=first, name=NAME, checkpoint_storage=storage)
    return builder.add_edge(first, second).add_edge(second, first).build()


class PrintingStorage(AgentStateCheckpointStorage):
    """Says when a checkpoint is stored."""

    async def save(self, checkpoint: Any) -> str:
        saved = await super().save(checkpoint)
        sys.stdout.write(f"{checkpoint.iteration_count}\n")
        sys.stdout.flush()
        return saved


async def main(directory: str) -> None:
    """Go on from the newest checkpoint, or begin; print a line for each one that is stored."""
    async with PrintingStorage(directory, allowed_checkpoint_types=ALLOWED) as storage:
        latest = await storage.get_latest(workflow_name=NAME)
        workflow = workflow_with(storage)
        if latest is None:
            result = await workflow.run(Draft(""))
        else:
            result = await workflow.run(checkpoint_id=latest.checkpoint_id)
        sys.stdout.write(f"{result.get_outputs()}\n")

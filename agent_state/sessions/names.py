"""Ids and names of a session: session ids, agent types, roles, conversation ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from agent_state.errors import InvalidConversationIdError, StateValidationError

ROLES = ("user", "assistant", "system", "tool")
"""The roles that every application has."""

_AGENT_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SESSION_ID = re.compile(r"[A-Za-z0-9.-]{1,128}")


class NameRegistry:
    """The names that an application uses for one sort of thing, in the order of registration.

    While nothing is registered, every well-formed name is accepted; afterwards only registered
    names are. ``noun`` names the sort in messages, ``error`` is raised for a refused name,
    ``is_valid`` returns whether a name is well-formed.
    """

    def __init__(
        self,
        noun: str,
        error: type[StateValidationError],
        names: Iterable[str] = (),
        *,
        is_valid: Callable[[object], bool],
    ) -> None:
        self._noun = noun
        self._error = error
        self._is_valid = is_valid
        self._names: dict[str, None] = {}
        self.register(*names)

    def register(self, *names: str) -> None:
        """Accept these names, and from now on no unregistered ones. Registering twice is a no-op.

        Raises the registry's error for a malformed name; then none of the names is registered.
        """
        for name in names:
            if not self._is_valid(name):
                raise self._error(f"{name!r:.80} is not a valid {self._noun}")
        self._names.update(dict.fromkeys(names))

    def accepts(self, name: object) -> bool:
        """Whether ``check`` would pass."""
        return self._is_valid(name) and (not self._names or name in self._names)

    def check(self, name: str) -> None:
        """Raise the registry's error unless the name is accepted."""
        if not self._is_valid(name):
            raise self._error(f"{name!r:.80} is not a valid {self._noun}")
        if not self.accepts(name):
            known = ", ".join(self._names)
            raise self._error(f"{name!r:.80} is not a registered {self._noun}; these are: {known}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


def is_name(name: object) -> bool:
    """Whether it is non-empty text."""
    return isinstance(name, str) and bool(name)


def is_agent_type(name: object) -> bool:
    """Whether it is lower-case letters, digits and ``_``, at most 64, beginning with a letter."""
    return isinstance(name, str) and _AGENT_TYPE.fullmatch(name) is not None


def is_session_id(text: object) -> bool:
    """Whether it is letters, digits, ``-`` and ``.``, at most 128."""
    return isinstance(text, str) and _SESSION_ID.fullmatch(text) is not None


def conversation_id_of(session_id: str, agent_type: str) -> str:
    """``conv_<agent type>_<session id>``; it is unambiguous, as session ids contain no ``_``."""
    return f"conv_{agent_type}_{session_id}"


def parse_conversation_id(conversation_id: str) -> tuple[str, str]:
    """Return session id and agent type. Raises ``InvalidConversationIdError``."""
    head, _, session_id = conversation_id.rpartition("_")
    agent_type = head.removeprefix("conv_")
    if head == agent_type or not is_agent_type(agent_type) or not is_session_id(session_id):
        raise InvalidConversationIdError(f"{conversation_id!r:.200} is not a conversation id")
    return session_id, agent_type


_ORCHESTRATION = "; agent_state_integrations.orchestration has SessionManagerService with this call"
_ORCHESTRATOR = "extend, and Orchestration.of(sessions)"
FORMER_CALLS = {
    "create_session": "create(…)",
    "get_session": "get(…)",
    "update_session": "update(…)",
    "destroy_session": "destroy(…)",
    "validate_session": "validate(…)",
    "get_session_history": "history(…)",
    "cleanup_expired_sessions": "cleanup()",
    "add_conversation_message": f"conversations.add(…){_ORCHESTRATION}",
    "get_conversation_history": f"conversations.page(…).messages{_ORCHESTRATION}",
    "update_conversation_orchestrator_context": f"conversations.update_context(…){_ORCHESTRATION}",
    "track_workflow_state": "workflows.track(…)",
    "persist_session_state": "states.save(…)",
    "restore_session_state": "states.load(…)",
    "track_orchestrator_workflow": f"{_ORCHESTRATOR}.track(…){_ORCHESTRATION}",
    "get_orchestrator_state": f"{_ORCHESTRATOR}.state(…){_ORCHESTRATION}",
    "update_enabling_service_status": f"{_ORCHESTRATOR}.report_service(…){_ORCHESTRATION}",
}
"""What takes the place of the calls of the first design."""

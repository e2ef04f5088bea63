"""Whether a state may be stored, and whether what was stored may be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from agent_state.errors import StateValidationError
from agent_state.models import SCHEMAS

_NAMED = 20


class ModelStateValidator:
    """The default validator: each schema's pydantic model; a schema without one may hold anything.

    ``models`` adds to the known ones, or replaces them.
    """

    def __init__(self, models: Mapping[str, type[BaseModel]] | None = None) -> None:
        self._models = dict(models or {})

    def validate(self, kind: str, state: Mapping[str, Any]) -> BaseModel | None:
        """The model built from the state; None for a schema without a model.

        Raises ``StateValidationError`` that names each invalid field.
        """
        model = self._models.get(kind) or SCHEMAS.get(kind)
        if model is None:
            return None
        try:
            return model.model_validate(state if isinstance(state, dict) else dict(state))
        except ValidationError as error:
            raise StateValidationError(format_validation_error(error), kind=kind) from error


def format_validation_error(error: ValidationError) -> str:
    """The fields and what is wrong with them, without the values, which may be private."""
    faults = [
        f"{'.'.join(str(part) for part in fault['loc']) or 'the state':.200}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return "not a valid state: " + "; ".join(faults[:_NAMED]) + more

"""Answers as JSON, with every field that a model has."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response
from pydantic import BaseModel


def reply(value: object, status: int = 200) -> Response:
    """An answer. Models are written whole; what is stored leaves out what nobody has set."""
    text = json.dumps(whole(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(), status, media_type="application/json")


def whole(value: Any) -> Any:
    """A value of models, lists and objects, with the defaults of the models."""
    if isinstance(value, BaseModel):
        fields = {name: whole(getattr(value, name)) for name in type(value).model_fields}
        return {**fields, **{name: whole(more) for name, more in (value.model_extra or {}).items()}}
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(one) for one in value]
    return value

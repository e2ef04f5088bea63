"""Answers as JSON, and what the OpenAPI document says about them.

An answer has all fields of its model. Documents are stored as their writers wrote them; an answer
has one spelling of each thing, so that a client can rely on types: a time is RFC 3339 in UTC (null
if the stored text is none), and a status or a priority is one of our words (``unknown`` for
another program's).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, get_args

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from agent_state.clock import instant, stamp
from agent_state.models import (
    PRIORITIES,
    AgentState,
    AgentStatus,
    MailMessage,
    MailStatus,
    Priority,
    StoredTime,
    Task,
    TaskStatus,
    meaning_of,
)
from agent_state.sessions.models import EXTENSION_FIELDS

UNKNOWN = "unknown"
"""The status, in an answer, that another program stored and that is none of ours."""

_COMPRESSED_FROM = 1000
"""Smaller answers, in bytes, are not compressed."""

_STATUSES: dict[type[BaseModel], tuple[str, ...]] = {
    AgentState: get_args(AgentStatus),
    Task: get_args(TaskStatus),
    MailMessage: get_args(MailStatus),
}
_RANKED: tuple[type[BaseModel], ...] = (Task, MailMessage)
"""The models with a priority."""
_PRIORITIES: tuple[str, ...] = get_args(Priority)
_NAMES = {
    "AgentState": "Agent",
    "MailMessage": "Mail",
    "SleepState": "Sleep",
    "SessionView": "Session",
}
"""The names of schemas that are not named as their models; another model gives its own, as
``json_schema_extra={"title": …}``."""
_REF = "#/components/schemas/"

# -- answering ---------------------------------------------------------------------------------


class JSONReply(JSONResponse):
    """A value as JSON. Models have all their fields; a stored document omits unset ones."""

    def render(self, content: object) -> bytes:
        text = json.dumps(
            to_answer(content), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return text.encode()


def compressed(request: Request, reply: Response) -> Response:
    """The reply, compressed if the client takes that, it is long, and is no event stream."""
    if isinstance(reply, StreamingResponse):
        if takes_gzip(request):
            reply.body_iterator = _gzipped(reply.body_iterator)
            reply.headers["Content-Encoding"] = "gzip"
    elif len(reply.body) >= _COMPRESSED_FROM and takes_gzip(request):
        reply.body = gzip.compress(reply.body, 5, mtime=0)
        reply.headers["Content-Encoding"] = "gzip"
        reply.headers["Content-Length"] = str(len(reply.body))
    reply.headers["Vary"] = "Accept-Encoding"
    return reply


async def _gzipped(pieces: AsyncIterable[str | bytes | memoryview]) -> AsyncIterator[bytes]:
    packer = zlib.compressobj(5, wbits=zlib.MAX_WBITS | 16)
    async for piece in pieces:
        packed = packer.compress(piece.encode() if isinstance(piece, str) else piece)
        if packed:
            yield packed
    yield packer.flush()


def takes_gzip(request: Request) -> bool:
    """Whether the client accepts gzip (RFC 9110, 12.5.3)."""
    weights = dict[str, bool]()
    for one in ",".join(request.headers.getlist("accept-encoding")).lower().split(","):
        name, _, weight = one.replace(" ", "").partition(";q=")
        weights[name] = re.fullmatch(r"0(\.0*)?", weight) is None
    return weights.get("gzip", weights.get("*", False))


def to_answer(value: Any) -> Any:
    """A value of models, lists and objects, with all fields of the models, spelt in one way."""
    if isinstance(value, BaseModel):
        spellings = _spellings(type(value))
        answer = {}
        for name in (*type(value).model_fields, *(value.model_extra or {})):
            field = to_answer(getattr(value, name))
            spell = spellings.get(name)
            answer[name] = field if spell is None else spell(field)
        return answer
    if isinstance(value, dict):
        return {name: to_answer(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_answer(one) for one in value]
    return value


@cache
def _spellings(model: type[BaseModel]) -> dict[str, Callable[[Any], Any]]:
    """What spells a field of the model, for the fields that are stored as their writer likes."""
    found: dict[str, Callable[[Any], Any]] = {
        name: _time
        for name, field in model.model_fields.items()
        if field.annotation == StoredTime | None
    }
    words = _STATUSES.get(model)
    if words is not None:
        found["status"] = partial(_status, words)
    if model in _RANKED:
        found["priority"] = _priority
    return found


def _time(stored: str | float | None) -> str | None:
    try:
        return None if stored is None else stamp(instant(stored))
    except ValueError:  # a person wrote it
        return None


def _status(words: Sequence[str], stored: str) -> str:
    meaning = meaning_of(stored)
    return meaning if meaning in words else UNKNOWN


def _priority(stored: str) -> str:
    return _PRIORITIES[PRIORITIES.get(stored, PRIORITIES["normal"])]


# -- describing --------------------------------------------------------------------------------


def describe_answers(document: dict[str, Any]) -> None:
    """Make an OpenAPI document of validation schemas say what the answers really are.

    A schema of an answer requires all its fields, has no defaults, is closed unless its model is
    open, and says which words and times its fields have. One that requests use, too, is kept for
    them as ``…Input``.
    """
    schemas: dict[str, Any] = document["components"]["schemas"]
    _add_session_extensions(schemas)
    asked, answered = set[str](), set[str]()
    for operation in _operations(document):
        asked |= _reached(operation.get("requestBody", {}), schemas)
        asked |= _reached(operation.get("parameters", []), schemas)
        answered |= _reached(operation["responses"], schemas)
    both = {f"{_REF}{name}": f"{_REF}{name}Input" for name in asked & answered}
    inputs = {
        f"{name}Input" if name in answered else name: _renamed(schemas[name], both)
        for name in asked
    }
    for operation in _operations(document):
        if "requestBody" in operation:
            operation["requestBody"] = _renamed(operation["requestBody"], both)
    models = {model.__name__: model for model in _STATUSES}
    for name in answered:
        _describe_answer(schemas[name], models.get(name))
    schemas.update(inputs)
    for schema in schemas.values():
        _drop_titles(schema)
    names = {f"{_REF}{name}": f"{_REF}{_name(name, schemas)}" for name in schemas}
    found = _renamed(document, names)
    renamed = {
        new.removeprefix(_REF): found["components"]["schemas"][old.removeprefix(_REF)]
        for old, new in names.items()
    }
    for name, schema in renamed.items():
        schema.pop("title", None)
        if "enum" in schema:
            schema["title"] = name
    document.update(found)
    document["components"]["schemas"] = dict(sorted(renamed.items()))


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        yield from operations.values()


def _add_session_extensions(schemas: dict[str, Any]) -> None:
    """Describe the fields that installed packages add to sessions."""
    if "SessionView" not in schemas or not EXTENSION_FIELDS:
        return
    _, added = models_json_schema(
        [(model, "validation") for model in EXTENSION_FIELDS.values()],
        ref_template=_REF + "{model}",
    )
    for name, schema in added["$defs"].items():
        schemas.setdefault(name, schema)
    for field, model in EXTENSION_FIELDS.items():
        optional = {"$ref": f"{_REF}{model.__name__}", "x-extension": True}
        schemas["SessionView"]["properties"][field] = optional


def _reached(part: object, schemas: Mapping[str, Any]) -> set[str]:
    """The names of the schemas that a part of the document refers to, however indirectly."""
    found, waiting = set[str](), [part]
    while waiting:
        current = waiting.pop()
        if isinstance(current, list):
            waiting += current
        elif isinstance(current, dict):
            waiting += current.values()
            name = str(current.get("$ref", "")).removeprefix(_REF)
            if name in schemas and name not in found:
                found.add(name)
                waiting.append(schemas[name])
    return found


def _renamed(part: Any, names: Mapping[str, str]) -> Any:
    """A copy of a part of the document that refers to schemas by their new names."""
    if isinstance(part, list):
        return [_renamed(one, names) for one in part]
    if isinstance(part, dict):
        copy = {key: _renamed(one, names) for key, one in part.items()}
        if part.get("$ref") in names:
            copy["$ref"] = names[part["$ref"]]
        return copy
    return part


def _describe_answer(schema: dict[str, Any], model: type[BaseModel] | None) -> None:
    fields = schema.get("properties")
    if fields is None:
        return
    for name, field in fields.items():
        field.pop("default", None)
        types = [one.get("type") for one in field.get("anyOf", [])]
        if {"string", "integer", "number"} <= set(types):  # a stored time
            field["anyOf"] = [{"type": "string", "format": "date-time"}, {"type": "null"}]
        elif name in {"at", "timestamp", "last_activity"} or name.endswith("_at"):
            for one in (field, *field.get("anyOf", [])):
                if one.get("type") == "string":
                    one["format"] = "date-time"
    if model is not None:
        fields["status"]["enum"] = [*_STATUSES[model], UNKNOWN]
    if model in _RANKED:
        fields["priority"]["enum"] = [*_PRIORITIES]
    schema["required"] = [name for name, field in fields.items() if not field.pop("x-extension", 0)]
    schema.setdefault("additionalProperties", False)


def _drop_titles(schema: dict[str, Any]) -> None:
    """Leave out the titles of fields, which only repeat their names."""
    for field in schema.get("properties", {}).values():
        if isinstance(field, dict) and isinstance(field.get("title"), str):
            del field["title"]


def _name(name: str, schemas: Mapping[str, Any]) -> str:
    """The name that a person would choose: ``AgentPage`` for ``Page_AgentState_``."""
    if name.startswith("Page_"):
        return _name(name.removeprefix("Page_").removesuffix("_"), schemas) + "Page"
    title = str(schemas.get(name, {}).get("title", ""))
    return _NAMES.get(name) or (title if title.isidentifier() else name)

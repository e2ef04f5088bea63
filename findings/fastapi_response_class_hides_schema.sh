#!/usr/bin/env bash
# FastAPI 0.165.0: a JSON response class that does not derive from JSONResponse turns every documented schema into text.
#
# Guess before looking: the schema comes from `response_model`, and the media type from the response class.
# Seen: FastAPI asks whether the class is a `JSONResponse`. For another class that says `media_type = "application/json"`,
# a faster encoder for example, `response_model` is ignored in the OpenAPI document: its schema is {"type": "string"}. A model given
# by `responses={200: {"model": …}}` is kept and gets "type": "string" beside its reference, which no object satisfies.
# The server answers as before; only generated clients and fuzzers notice.
# Met: routes with a response class of their own, and a contract test against their OpenAPI document.
#
# Output seen:
#   derives from JSONResponse      {'$ref': '#/components/schemas/Task'}
#   derives from Response          {'type': 'string'}
#   Response, model in responses   {'$ref': '#/components/schemas/Task', 'type': 'string'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check fastapi==0.165.0
"$folder/venv/bin/python" - <<'PYTHON'
import json

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Task(BaseModel):
    task_id: str


class DerivedReply(JSONResponse):
    pass


class OwnReply(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode()


app = FastAPI()


@app.get("/derived", response_model=Task, response_class=DerivedReply)
@app.get("/own", response_model=Task, response_class=OwnReply)
@app.get("/listed", response_class=OwnReply, responses={200: {"model": Task}})
def task() -> None: ...


REFERENCE = {"$ref": "#/components/schemas/Task"}
SEEN = {
    "/derived": ("derives from JSONResponse", REFERENCE),
    "/own": ("derives from Response", {"type": "string"}),
    "/listed": ("Response, model in responses", {**REFERENCE, "type": "string"}),
}
paths = app.openapi()["paths"]
for path, (what, expected) in SEEN.items():
    schema = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    print(f"{what:30} {schema}")
    assert schema == expected, f"version 0.165.0 documented {expected}"
PYTHON

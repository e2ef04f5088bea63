"""The OpenAPI document says what the answers are, in a way that types well."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.web import LiveBackend, create_app
from agent_state.web.problems import MAPPINGS, Code
from tests.web.client import answering, openapi


def _schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = openapi()["components"]["schemas"][name]
    return found


def _references(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def test_an_answer_has_all_its_fields_and_a_request_only_those_that_it_needs() -> None:
    for name in ("Task", "Agent", "Mail", "Sleep", "TaskPage", "Journey", "ConversationPage"):
        schema = _schema(name)
        assert schema["required"] == [*schema["properties"]], name
        assert not [field for field in schema["properties"].values() if "default" in field]
    assert _schema("NewTask")["required"] == ["name"]
    assert _schema("NewTask")["properties"]["max_attempts"]["default"] == 3
    assert _schema("NewTask")["additionalProperties"] is False


def test_an_answer_is_closed_unless_its_document_keeps_unknown_fields() -> None:
    assert _schema("TaskPage")["additionalProperties"] is False
    assert _schema("Task")["additionalProperties"] is True
    assert _schema("Session")["additionalProperties"] is True


def test_words_and_times_of_answers_are_typed() -> None:
    task, mail = _schema("Task")["properties"], _schema("Mail")["properties"]

    assert task["status"]["enum"][:2] == ["pending", "in_progress"]
    assert "unknown" in task["status"]["enum"]
    assert mail["priority"]["enum"] == ["low", "normal", "high", "urgent"]
    assert task["created_at"]["anyOf"] == [
        {"type": "string", "format": "date-time"},
        {"type": "null"},
    ]
    assert _schema("Session")["properties"]["expires_at"]["format"] == "date-time"
    assert _schema("SessionEvent")["properties"]["at"]["format"] == "date-time"


def test_the_names_are_those_that_a_person_would_choose() -> None:
    names = openapi()["components"]["schemas"].keys()

    assert {"Agent", "AgentPage", "Mail", "MailPage", "Session", "JourneyMessagePage"} <= names
    assert not [name for name in names if not re.fullmatch("[A-Z][A-Za-z]+", name)]
    assert {f"#/components/schemas/{name}" for name in names} >= {*_references(openapi())}


def test_a_field_that_an_installed_package_adds_to_sessions_is_typed_and_optional() -> None:
    session = _schema("Session")

    assert session["properties"]["orchestrator_context"] == {
        "$ref": "#/components/schemas/OrchestratorContext"
    }
    assert "orchestrator_context" not in session["required"]


def test_every_code_of_a_problem_is_listed() -> None:
    codes = _schema("ProblemCode")["enum"]

    assert codes == [*get_args(Code)]
    assert {mapping.code for mapping in MAPPINGS.values()} <= {*codes}
    assert _schema("Problem")["required"] == ["type", "title", "status", "code", "detail"]


def test_every_event_of_a_stream_has_a_schema() -> None:
    stream = openapi()["paths"]["/api/events"]["get"]["responses"]["200"]["content"]
    refers = stream["text/event-stream"]["schema"]["contentSchema"]["$ref"]
    events = [ref.rpartition("/")[2] for ref in _references(_schema(refers.rpartition("/")[2]))]

    assert [_schema(name)["properties"]["event"]["const"] for name in events] == [
        "ready",
        "change",
        "gone",
        "reset",
    ]
    stands_for = _schema(refers.rpartition("/")[2])["discriminator"]["mapping"]
    assert [stands_for[_schema(name)["properties"]["event"]["const"]] for name in events] == [
        f"#/components/schemas/{name}" for name in events
    ]


def test_every_tag_is_described() -> None:
    used = {
        tag
        for operations in openapi()["paths"].values()
        for operation in operations.values()
        for tag in operation["tags"]
    }

    assert {tag["name"] for tag in openapi()["tags"] if tag["description"]} == used


async def test_what_other_programs_and_people_stored_is_answered_in_our_words(
    tmp_path: Path,
) -> None:
    async with AsyncAgentSessionManager(tmp_path / "state") as runtime:
        odd = {"agent_id": "odd", "status": "In Progress", "created_at": 1767225600, "mood": "good"}
        await runtime.manager.save("agents", "odd", {**odd, "status": "ACTIVE"})
        await runtime.manager.save(
            "tasks",
            ("odd", "t"),
            {
                "task_id": "t",
                "status": "paused",
                "priority": "medium",
                "created_at": "yesterday",
                "started_at": "2026-01-01T01:00:00+01:00",
            },
        )
        async with answering(LiveBackend(runtime=runtime)) as client:
            agent = (await client.get("/api/agents/odd")).json()
            [task] = (await client.get("/api/agents/odd/tasks")).json()["items"]

    assert (agent["status"], agent["mood"]) == ("active", "good")
    assert agent["created_at"] == "2026-01-01T00:00:00.000000Z"
    assert (task["status"], task["priority"]) == ("unknown", "normal")
    assert (task["created_at"], task["started_at"]) == (None, "2026-01-01T00:00:00.000000Z")


async def test_the_routes_of_one_application_say_nothing_of_what_it_has_not(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "state") as manager:
        document = create_app(LiveBackend(manager=manager), routers=[]).openapi()

    assert not [path for path in document["paths"] if "journeys" in path]
    assert "Journey" not in document["components"]["schemas"]


def test_every_body_has_an_example_that_the_model_takes() -> None:
    document = openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody")
            if body is None:
                continue
            [name] = re.findall(r'schemas/(\w+)"', json.dumps(body))
            examples = document["components"]["schemas"][name].get("examples")
            assert examples, f"{method} {path}"
            components = document["components"]
            for example in examples:
                jsonschema.validate(
                    example, {**components["schemas"][name], "components": components}
                )

"""What every command prints with ``--json`` has the form that docs/cli.schema.json states.

The file has a JSON Schema for each command: members that are not in it fail, and so do those that
are missing. A command without a schema fails, and so does a schema without a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agent_state import AgentRuntime
from agent_state.cli.app import app, run
from agent_state.encryption import generate_master_key
from tests.cli.commands import APART, commands_of
from tests.cli.test_document import directory  # noqa: F401  # a fixture: a state with all kinds
from tests.frameworks import ABSENT
from tests.git.repositories import CLEAN, Repository
from tests.redis.mirrors import PREFIX, caught_up, mirror
from tests.redis.servers import RedisServer

SCHEMAS = json.loads((Path(__file__).parents[2] / "docs/cli.schema.json").read_bytes())
COMMANDS = {
    " ".join(path): command
    for path, command in commands_of(app)
    if "--json" in {name for each in command.params for name in each.opts}
}

LOOKS = """
ls | ls tasks | ls --sizes | show bob | show tasks/alice/papers | show system/events
agents ls | agents show alice | tasks ls | tasks show papers
mail ls | mail show alice/m1 | sleep ls | sleep show bob | sessions ls | sessions show 4f1c09ab
conversations ls | conversations show 4f1c09ab/writer | logs ls | logs show system/events
verify | doctor | top --once | restore --dry-run | cleanup --dry-run
record status | record query | record query --count | record conversations --messages
record archive --dry-run | record archive --verify | record checkpoints ls
record checkpoints verify | record import --dry-run examples/recordings/older
analytics | analytics --score spread --prices prices.toml | analytics --score legacy-flat
import legacy old --dry-run
"""
CHANGES = """
agents stop alice | agents start alice | agents wake bob
tasks submit alice index --payload '{"doc": "a b"}' | tasks cancel summary
tasks retry --status cancelled | tasks cancel --all | tasks delete outline
mail send alice "new figures" --body "see figures.csv"
cleanup --max-age-hours 0 | restore | export whole.zip | export alice.zip alice
import archive whole.zip --state other | import archive whole.zip --state other --dry-run
import legacy old | record checkpoints make friday | record checkpoints make
record query --out found.jsonl | record archive
"""
GIT = """
git doctor | git diff | git log alice | git blame alice status | git snapshot
git restore HEAD | git merge HEAD | git resolve | git fork trial
"""
SEALED = "rekey | keys ls | rekey --keys-only"
MIRRORED = "mirror rebuild | mirror verify | mirror status | mirror pull --state pulled"
ELSEWHERE = {
    "demo": "tests/demo: it takes seconds",
    "watch": "tests/operator/test_watch.py: it does not end by itself",
    "import agent-framework": "needs the framework",
    "import key-value": "needs the framework",
    "import langgraph": "needs the framework",
    "import openai": "needs the framework",
    "import strands": "needs the framework",
    "quarantine ls": "", "quarantine show": "", "quarantine restore": "", "quarantine drop": "",
    "record checkpoints export": "",
}  # fmt: skip


def lines(text: str) -> list[str]:
    return [each.strip() for line in text.strip().splitlines() for each in line.split(" | ")]


def name_of(words: list[str]) -> str:
    """The command that arguments name: the longest that there is."""
    return max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)


def printed(capsys: pytest.CaptureFixture[str], *words: str, before: tuple[str, ...] = ()) -> Any:
    """Call a command with ``--json``; what it printed, which must be as its schema says."""
    code = run([*before, *words, "--json"])
    out, err = capsys.readouterr()
    assert code in (0, 1), f"{words}: {err}"
    found = json.loads(out)
    check(name_of([*words]), found)
    return found


def check(name: str, found: Any) -> None:
    """Raises when this is not what the schema of the command says."""
    schema = {**SCHEMAS["commands"][name], "$defs": SCHEMAS["$defs"]}
    errors = [
        f"{name} {error.json_path}: {error.message:.300}"
        for error in Draft202012Validator(schema).iter_errors(found)
    ]
    assert not errors, errors


def test_every_command_with_json_has_a_schema_and_is_called_here() -> None:
    Draft202012Validator.check_schema(SCHEMAS)
    absent = {" ".join(path) for path, _ in commands_of(app, absent=True)}
    assert SCHEMAS["commands"].keys() - absent == COMMANDS.keys() | APART | {""}
    texts = (LOOKS, CHANGES, GIT, SEALED, MIRRORED)
    called = {name_of(shlex.split(each)) for text in texts for each in lines(text)}
    assert (called | ELSEWHERE.keys()) - absent == COMMANDS.keys()


def free(schema: dict[str, Any], path: str) -> list[str]:
    """The places of a schema that take anything and do not say why."""
    others = schema.get("additionalProperties")
    typed = {"anyOf", "const", "enum", "$ref"} & schema.keys() or "type" in schema
    closed = isinstance(others, dict) or others is False or schema.get("type") != "object"
    found = [] if "description" in schema or (typed and closed) else [path]
    parts = {f".{name}": each for name, each in schema.get("properties", {}).items()}
    parts |= {f"|{number}": each for number, each in enumerate(schema.get("anyOf", ()))}
    parts |= {"[]": schema["items"]} if schema.get("items") not in (None, False) else {}
    parts |= {".*": others} if isinstance(others, dict) else {}
    return found + [place for name, each in parts.items() for place in free(each, path + name)]


def test_a_schema_that_takes_anything_says_why() -> None:
    found = {**SCHEMAS["$defs"], **SCHEMAS["commands"]}
    assert [place for name, each in found.items() for place in free(each, name)] == []


@pytest.mark.usefixtures("directory")
def test_what_commands_print_that_look(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prices.toml").write_text('currency = "EUR"\n["*"]\ninput = 3\noutput = 15\n')
    assert run(["--json", "--state", "state"]) == 0
    check("", json.loads(capsys.readouterr().out))
    for line in lines(LOOKS):
        printed(capsys, *shlex.split(line))


@pytest.mark.usefixtures("directory")
def test_what_commands_print_that_change_something(capsys: pytest.CaptureFixture[str]) -> None:
    for line in lines(CHANGES):
        printed(capsys, *shlex.split(line))
    made = printed(capsys, "record", "checkpoints", "ls")
    ident = made[0]["checkpoint_id"]
    printed(capsys, "record", "checkpoints", "export", ident, "decided.json")


def test_what_commands_print_of_damage(
    directory: Path,  # noqa: F811  # the fixture
    capsys: pytest.CaptureFixture[str],
) -> None:
    alice = directory / "state/agents/alice.json"
    alice.write_bytes(alice.read_bytes()[:40])
    os.utime(alice, (1_000_000_000, 1_000_000_000))
    for line in ("ls", "agents ls", "verify", "doctor", "restore"):
        printed(capsys, *shlex.split(line))
    aside = printed(capsys, "quarantine", "ls")["quarantine"]
    (name,) = (each["path"] for each in aside)
    printed(capsys, "ls")
    assert printed(capsys, "verify")["quarantine"]
    with (directory / "state/system/events.jsonl").open("a") as log:
        log.write('{"typed": "by hand"}\n')
    (directory / "state/.journal/1.wal").write_bytes(b"no journal")
    found = printed(capsys, "verify")
    assert found["notices"], found
    assert run(["--json", "--state", "state"]) in (0, 1)
    check("", json.loads(capsys.readouterr().out))
    (directory / "state/.journal/1.wal").unlink()
    printed(capsys, "quarantine", "show", name)
    printed(capsys, "quarantine", "drop", name)
    alice.write_bytes(b"{")
    os.utime(alice, (1_000_000_000, 1_000_000_000))
    printed(capsys, "restore")
    (again,) = printed(capsys, "quarantine", "ls")["quarantine"]
    (directory / "state" / again["path"]).write_text('{"agent_id": "alice"}')
    printed(capsys, "quarantine", "restore", again["path"])


def test_what_commands_of_git_print(
    directory: Path,  # noqa: F811  # the fixture
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", CLEAN["GIT_AUTHOR_NAME"])
        monkeypatch.setenv(f"{name}_EMAIL", CLEAN["GIT_AUTHOR_EMAIL"])
    repository = Repository(directory)
    assert run(["git", "init"]) == 0
    repository.commit()
    alice = directory / "state/agents/alice.json"
    alice.write_text(alice.read_text().replace('"active"', '"idle"'))
    capsys.readouterr()
    for line in lines(GIT):
        printed(capsys, *shlex.split(line))


@pytest.mark.usefixtures("directory")
def test_what_commands_of_keys_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KEYRING", "MASTER_KEYS", "MASTER_KEYS_FILE"):
        monkeypatch.delenv(f"AGENT_STATE_{name}", raising=False)
    Path("masters").write_text(generate_master_key())
    for line in lines(SEALED):
        before = ("--keyring", "ring", "--master-keys", "masters")
        printed(capsys, *shlex.split(line), before=before)


@pytest.mark.usefixtures("directory")
def test_what_commands_of_the_mirror_print(
    capsys: pytest.CaptureFixture[str], server: RedisServer
) -> None:
    for line in lines(MIRRORED):
        printed(capsys, *shlex.split(line), "--redis", server.url)


def test_what_commands_print_of_a_directory_that_a_server_has_mirrored(
    directory: Path,  # noqa: F811  # the fixture
    capsys: pytest.CaptureFixture[str],
    server: RedisServer,
) -> None:
    async def serve() -> None:
        async with AgentRuntime(directory / "state", mirror=mirror(server.url)) as runtime:
            await caught_up(runtime.manager)
            assert run(["--json", "--state", "state"]) == 0

    asyncio.run(serve())
    while_served = json.loads(capsys.readouterr().out)
    check("", while_served)
    assert while_served["owner"] == os.getpid()
    assert run(["--json", "--state", "state"]) == 0
    after = json.loads(capsys.readouterr().out)
    check("", after)
    assert (after["last_start"]["status"], after["mirror"]["state"]) == ("stopped", "closed")
    found = printed(capsys, "mirror", "status", "--redis", server.url, "--prefix", PREFIX)
    assert found["server"]["sent"] > 0
    server.kill()
    found = printed(capsys, "mirror", "status", "--redis", server.url, "--prefix", PREFIX)
    assert found["redis"] == {}


@pytest.mark.parametrize(
    "framework", ["agent-framework", "key-value", "langgraph", "openai", "strands"]
)
@pytest.mark.usefixtures("directory")
def test_what_imports_print(capsys: pytest.CaptureFixture[str], framework: str) -> None:
    if any(name.startswith(framework.replace("-", "_")) for name in ABSENT):
        pytest.skip(f"{framework} is not installed")
    source = Path(framework)
    if framework == "openai":
        with sqlite3.connect(source) as database:
            database.executescript(
                "CREATE TABLE agent_sessions (session_id TEXT PRIMARY KEY,"
                " created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,"
                " updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP);"
                "CREATE TABLE agent_messages (id INTEGER PRIMARY KEY AUTOINCREMENT,"
                " session_id TEXT NOT NULL, message_data TEXT NOT NULL,"
                " created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP);"
                "INSERT INTO agent_sessions (session_id) VALUES ('s1');"
                "INSERT INTO agent_messages (session_id, message_data)"
                """ VALUES ('s1', '{"role": "user", "content": "hi"}');"""
            )
        database.close()
    elif framework == "langgraph":
        sqlite = pytest.importorskip("langgraph.checkpoint.sqlite", reason="no SqliteSaver here")
        with sqlite.SqliteSaver.from_conn_string(str(source)) as saver:
            saver.setup()
    else:
        source.mkdir()
        if framework == "key-value":
            source.joinpath("c-info.json").write_text('{"collection": "c"}')
    printed(capsys, "import", framework, str(source))
    shutil.rmtree("other", ignore_errors=True)

"""Tells git of the merge driver and of differences in words, in an order that is safe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent_state.storage import paths
from agent_state_integrations.git import driver, merge_rules
from agent_state_integrations.git.repository import OLDEST, GitError, GitRepository

NAME = "agent-state"
_HEAD = "# agent-state git init: how documents and logs are merged and shown."
_ENDINGS = ("*.json", "*.jsonl")
_KEYS = (f"merge.{NAME}", f"diff.{NAME}")
_HOOK = """\
#!/bin/sh
# Written by agent-state git init: what is committed is one state, and no conflict is among it.
exec {command} git hook --state {state} pre-commit
"""


def configure(
    repository: GitRepository, *, prefer: str = "completed", hooks: bool = False
) -> list[str]:
    """Set everything up; what was done, line by line.

    First the driver, then the attributes: an attribute without its driver stops every merge.
    ``prefer``: the outcome of a task that one side completed and the other cancelled. Raises
    ``GitError``.
    """
    repository.require(*OLDEST)
    done = []
    for name, value in _settings(repository, prefer).items():
        repository.run("config", "--local", name, value)
        done.append(f"{name} = {value}")
    _compile()
    done += _add(repository.path("info/attributes"), _lines(f"/{repository.prefix}**/"))
    repository.state.mkdir(parents=True, exist_ok=True)
    done += _add(repository.state / ".gitattributes", _lines(""))
    if hooks:
        done.append(_write_hook(repository))
    return done


def _settings(repository: GitRepository, prefer: str) -> dict[str, str]:
    python, script = shlex.quote(sys.executable), shlex.quote(driver.__file__)
    state = shlex.quote(repository.prefix.rstrip("/") or ".")
    text = shlex.quote(str(Path(driver.__file__).with_name("textconv.py")))
    return {
        f"merge.{NAME}.name": "documents and logs of agent_state, field by field",
        f"merge.{NAME}.driver": f"{python} -I -S {script} %O %A %B %P {state} {prefer}",
        f"diff.{NAME}.textconv": f"{python} -I -S {text}",
        f"diff.{NAME}.cachetextconv": "false",
    }


def _compile() -> None:
    """Leave compiled rules beside the driver, which each start of it reads."""
    import py_compile

    try:
        py_compile.compile(merge_rules.__file__, doraise=True)
    except OSError:
        return  # a read-only installation: each start compiles them


def _lines(prefix: str) -> list[str]:
    return [_HEAD, *(f"{prefix}{end} merge={NAME} diff={NAME} -text" for end in _ENDINGS)]


def _add(path: Path, lines: Sequence[str]) -> list[str]:
    text = path.read_text() if path.exists() else ""
    missing = [line for line in lines if line not in text.splitlines()]
    if not missing:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    end = "" if not text or text.endswith("\n") else "\n"
    path.write_text(text + end + "\n".join(missing) + "\n")
    return [f"{path}: {line}" for line in missing if not line.startswith("#")]


def _remove(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    kept = [line for line in lines if line != _HEAD and f"merge={NAME}" not in line]
    if kept == lines:
        return []
    if kept:
        path.write_text("\n".join(kept) + "\n")
    else:
        path.unlink()
    return [f"{path}: no merge={NAME} any more"]


def _hook(repository: GitRepository) -> Path:
    return repository.path("hooks/pre-commit")


def _write_hook(repository: GitRepository) -> str:
    path = _hook(repository)
    if path.exists() and "agent-state" not in path.read_text():
        raise GitError("there is a pre-commit hook already; call `agent-state git hook` in it")
    command = f"{shlex.quote(sys.executable)} -m agent_state"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HOOK.format(command=command, state=shlex.quote(str(repository.state))))
    path.chmod(0o755)
    return f"{path} was written"


def unconfigure(repository: GitRepository) -> list[str]:
    """Undo ``configure``, the attributes first; what was done."""
    done = _remove(repository.state / ".gitattributes") + _remove(
        repository.path("info/attributes")
    )
    for section in _KEYS:
        if repository.attempt("config", "--local", "--get-regexp", f"^{section}\\.").stdout:
            repository.run("config", "--local", "--remove-section", section)
            done.append(f"{section} was removed")
    hook = _hook(repository)
    if hook.exists() and "agent-state git init" in hook.read_text():
        hook.unlink()
        done.append(f"{hook} was removed")
    return done


def check(repository: GitRepository) -> list[str]:
    """What is wrong with the configuration and the worktree; empty if nothing is."""
    return [
        *_half_configured(repository),
        *_left_unmerged(repository),
        *_of_older_runs(repository),
    ]


def _half_configured(repository: GitRepository) -> Iterator[str]:
    if repository.version < OLDEST:
        yield f"git {repository.version} is older than {OLDEST}"
    keys = repository.attempt("config", "--get-regexp", f"^merge\\.{NAME}\\.").stdout
    command = repository.attempt("config", "--get", f"merge.{NAME}.driver").stdout.decode().strip()
    files = (repository.state / ".gitattributes", repository.path("info/attributes"))
    named = [path.exists() and f"merge={NAME}" in path.read_text() for path in files]
    if keys and not command:
        yield f"merge.{NAME}.* without merge.{NAME}.driver: every merge is fatal"
    elif any(named) and not command:
        yield "the attributes name a driver that is not configured: text is merged"
    elif command and not any(named):
        yield "the driver is configured, and no attribute names it"
    elif command and not all(named):
        yield f"{files[named.index(False)]} does not name the driver"
    if command and not Path(shlex.split(command)[0]).exists():
        yield f"the driver's Python is gone: {command}"


def _left_unmerged(repository: GitRepository) -> Iterator[str]:
    for path in repository.unmerged():
        if repository.below(path) is not None:
            yield f"{path} is unmerged; `agent-state git resolve` may settle it"
            note = repository.note(path)
            if note.exists():
                yield f"{path}: {note.read_text().strip()}"


def _of_older_runs(repository: GitRepository) -> Iterator[str]:
    """What git has of the runs of older versions, which kept it among the documents."""
    folder = f"{repository.prefix}system/"
    for path in map(os.fsdecode, repository.run("ls-files", "-z", "--", folder).split(b"\0")[:-1]):
        name = path.removeprefix(folder).partition("/")[0].removesuffix(paths.DOCUMENT)
        if name in paths.RUN_NAMES:
            yield f"{path} is of an older version's run; `git rm --cached` it"

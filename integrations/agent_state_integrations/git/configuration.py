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
_ATTRIBUTES = f"merge={NAME} diff={NAME} -text"
_KEYS = (f"merge.{NAME}", f"diff.{NAME}")
_HOOK = """\
#!/bin/sh
# Written by agent-state git init: what is committed is one state, and no conflict is among it.
exec {command} git hook --state={state} pre-commit
"""


def configure(
    repository: GitRepository, *, prefer: str = "completed", hooks: bool = False
) -> list[str]:
    """Set everything up; what was done, line by line.

    First the driver, then the attributes: an attribute without its driver stops every merge.
    ``prefer``: the outcome of a task that one side completed and the other cancelled. Raises
    ``GitError``, before anything is done where no hook can be written.
    """
    repository.require(*OLDEST)
    hook = _hook_to_write(repository) if hooks else None
    done = []
    for name, value in _settings(repository, prefer).items():
        repository.run("config", "--local", name, value)
        done.append(f"{name} = {value}")
    _compile()
    done += _add(repository.path("info/attributes"), _lines(f"/{repository.prefix}"))
    repository.state.mkdir(parents=True, exist_ok=True)
    done += _add(repository.state / ".gitattributes", _lines())
    if hook is not None:
        done.append(_write_hook(repository, hook))
    return done


def preference(repository: GitRepository) -> str:
    """The outcome that ``configure`` was told of, for a task that has two; else ``completed``."""
    words = shlex.split(_driver(repository))
    return words[-1] if words[-1:] == ["cancelled"] else "completed"


def _driver(repository: GitRepository) -> str:
    command = repository.attempt("config", "--get", f"merge.{NAME}.driver").stdout
    return os.fsdecode(command).strip()


def _settings(repository: GitRepository, prefer: str) -> dict[str, str]:
    python, script = shlex.quote(sys.executable), shlex.quote(driver.__file__)
    state = shlex.quote(repository.prefix.rstrip("/") or ".")
    text = shlex.quote(str(Path(driver.__file__).with_name("textconv.py")))
    start, end = (part.replace("%", "%%") for part in (f"{python} -I -S {script}", state))
    return {
        f"merge.{NAME}.name": "documents and logs of agent_state, field by field",
        f"merge.{NAME}.driver": f"{start} %O %A %B %P {end} {prefer}",
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


def _lines(folder: str = "") -> list[str]:
    return [_HEAD, *(f"{_pattern(folder, end)} {_ATTRIBUTES}" for end in _ENDINGS)]


def _pattern(folder: str, end: str) -> str:
    """An attribute's pattern for files below a folder, whatever characters its name has."""
    if not folder:
        return end
    name = "".join(f"\\{char}" if char in "\\*?[" else char for char in folder.strip("/"))
    pattern = f"/{name}/**/{end}" if name else f"/**/{end}"
    if not any(map(str.isspace, pattern)):
        return pattern
    for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n")):
        pattern = pattern.replace(char, escape)
    return f'"{pattern}"'


def _read(path: Path) -> str:
    """A file of the user's, with its own ends of lines, in whatever encoding."""
    return os.fsdecode(path.read_bytes()) if path.exists() else ""


def _write(path: Path, text: str) -> None:
    path.write_bytes(os.fsencode(text))


def _names_driver(line: str) -> bool:
    """Whether a line of attributes names the driver: no comment, and no longer word does."""
    return f"merge={NAME}" in line.split() and not line.startswith("#")


def _add(path: Path, lines: Sequence[str]) -> list[str]:
    text = _read(path)
    missing = [line for line in lines if line not in text.splitlines()]
    if not missing:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    end = "" if not text or text.endswith("\n") else "\n"
    _write(path, text + end + "\n".join(missing) + "\n")
    return [f"{path}: {line}" for line in missing if not line.startswith("#")]


def _remove(path: Path) -> list[str]:
    lines = _read(path).splitlines(keepends=True)
    kept = [line for line in lines if line.strip() != _HEAD and not _names_driver(line)]
    if kept == lines:
        return []
    if kept:
        _write(path, "".join(kept))
    else:
        path.unlink()
    return [f"{path}: no merge={NAME} any more"]


def _hook(repository: GitRepository) -> Path:
    return repository.path("hooks/pre-commit")


def _hook_to_write(repository: GitRepository) -> Path:
    """Where the hook goes. Raises ``GitError`` where another stands, or where it is not alone."""
    path, line = _hook(repository), "`agent-state git hook pre-commit`"
    if path.exists() and "agent-state" not in _read(path):
        raise GitError(f"there is a pre-commit hook already; call {line} in it", path=str(path))
    shared = repository.top / repository.line("rev-parse", "--git-common-dir")
    folders = (repository.top.resolve(), shared.resolve())
    if not any(path.resolve().is_relative_to(folder) for folder in folders):
        what = f"core.hooksPath has the hooks of other repositories too; call {line} in theirs"
        raise GitError(what, path=str(path))
    return path


def _write_hook(repository: GitRepository, path: Path) -> str:
    command = f"{shlex.quote(sys.executable)} -P -m agent_state"
    path.parent.mkdir(parents=True, exist_ok=True)
    # git starts a hook at the top of the worktree that commits, which may be a linked one.
    state = shlex.quote(repository.prefix.rstrip("/") or ".")
    _write(path, _HOOK.format(command=command, state=state))
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
    if "agent-state git init" in _read(hook):
        hook.unlink()
        done.append(f"{hook} was removed")
    return done


def check(repository: GitRepository) -> list[str]:
    """What is wrong with the configuration and the worktree; empty if nothing is."""
    return [
        *_half_configured(repository),
        *_ignored(repository),
        *_left_unmerged(repository),
        *_of_older_runs(repository),
    ]


def _half_configured(repository: GitRepository) -> Iterator[str]:
    if repository.version < OLDEST:
        yield f"git {repository.version} is older than {OLDEST}"
    keys = repository.attempt("config", "--get-regexp", f"^merge\\.{NAME}\\.").stdout
    command = _driver(repository)
    files = (repository.state / ".gitattributes", repository.path("info/attributes"))
    named = [any(map(_names_driver, _read(path).splitlines())) for path in files]
    if keys and not command:
        yield f"merge.{NAME}.* without merge.{NAME}.driver: every merge is fatal"
    elif any(named) and not command:
        yield "the attributes name a driver that is not configured: text is merged"
    elif command and not any(named):
        yield "the driver is configured, and no attribute names it"
    elif command and not all(named):
        yield f"{files[named.index(False)]} does not name the driver"
    elif command:
        yield from _overridden(repository)
    gone = [
        word for word in shlex.split(command)[:4] if word[:1] == "/" and not Path(word).exists()
    ]
    if gone:
        what = "Python" if command.startswith((gone[0], f"'{gone[0]}")) else "file"
        yield f"the driver's {what} is gone: {gone[0]}; call `agent-state git init` again"
    shown = repository.attempt("config", "--get", f"diff.{NAME}.textconv").stdout
    if command and not shown:
        yield f"diff.{NAME}.textconv is missing: `git diff` shows checksums and times"


def _overridden(repository: GitRepository) -> Iterator[str]:
    """The endings for which git finds other attributes than ours, wherever it has them from."""
    for name in ("agents/x.json", "system/x.jsonl"):
        path = f"{repository.prefix}{name}"
        said = repository.run("check-attr", "-z", "merge", "diff", "--", path).split(b"\0")
        for attribute, value in zip(said[1::3], said[2::3], strict=False):
            if value != NAME.encode():
                found = f"{attribute.decode()}={os.fsdecode(value)}"
                yield f"git takes {found} for {path}; the last line that fits it counts"


def _ignored(repository: GitRepository) -> Iterator[str]:
    """Whether no commit will have the state."""
    asked = f"{repository.prefix}x.json\0".encode()
    if repository.attempt("check-ignore", "--stdin", "-z", data=asked).stdout:
        yield f"git ignores {repository.state}: no commit and no snapshot has it"


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

"""Any text up to 4 KiB is an id: ten thousand of them, on paper and on a real disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from agent_state import FileStateStore, StatePersistenceManager, WALStateStore
from agent_state.protocols import Key
from agent_state.storage import paths
from agent_state.testing.contract_base import NASTY_IDS
from tests.faults.tally import Tally

ROW = pytest.mark.proof("T18", "any id: contained, never two on one name, and back again")

NASTY = (
    *NASTY_IDS,
    *("../../../../root", "..\\..\\windows", "//server/share", "C:\\x", "C:x", "\\\\?\\x", "~root"),
    *("con", "Con", "con.txt", "CON.json", "aux", "aux.", "com1", "COM¹", "lpt0", "conin$", "nul "),
    *("clock$", "com1.tar.gz", "prn.json.json", "con~0123456789abcdef", "..con", "con..", " con"),
    *(
        "é",
        "e\u0301",
        "É",
        "E\u0301",
        "ﬁ",
        "fi",
        "ß",
        "ss",
        "ẞ",
        "\u0131",
        "i",
        "\u0130",
        "I",
        "\u017f",
        "s",
        "K",
    ),
    *(
        "\u212a",
        "k",
        "Å",
        "\u212b",
        "A\u030a",
        "\u03c2",
        "\u03c3",
        "Σ",
        "\u1e9b\u0323",
        "한",
        "\u1112\u1161\u11ab",
    ),
    *(
        "\u202ecod.exe",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x7f",
        "\x1b[31m",
        "\t",
        "\n",
        "\r\n",
    ),
    *("👨\u200d👩\u200d👧", "🇨🇭", "\U0010ffff", "\ufffd", "\ufffe", "\0", "\0\0", "a\0b"),
    *(
        "a:b",
        "a:b:$DATA",
        "a|b",
        "a?b",
        "a*b",
        'a"b',
        "a<b>",
        "a;b",
        "a&b",
        "$(rm -rf)",
        "`x`",
        "'",
    ),
    *(
        ".",
        "..",
        "...",
        "....",
        ". ",
        " .",
        "a.",
        "a..",
        "a. .",
        ".a",
        "..a",
        "-",
        "--",
        "-rf",
        "~",
        "!",
    ),
    *(
        "%",
        "%%",
        "%2e",
        "%2E",
        "%2",
        "%zz",
        "%25",
        "%252e",
        "!a",
        "!!a",
        "!A",
        "!%41",
        "~0",
        "a~1",
        "A~1",
    ),
    *(".git", ".GIT", "git~1", ".gitignore", ".gitmodules", "HEAD", ".journal", ".locks", ".tmp-0"),
    *(
        "x.json",
        "x.jsonl",
        "x.JSON",
        ".json",
        ".jsonl",
        "json",
        "x.json.json",
        "x.reason.json",
        "archive",
    ),
    *("x" * 149, "x" * 150, "x" * 151, "X" * 75, "X" * 76, "é" * 25, "é" * 26, "." * 150, "%" * 60),
    *(
        "x" * 4096,
        "é" * 2048,
        "👍" * 1024,
        "x" * 4095 + "X",
        "\0" * 4096,
        "a/" * 2048,
        "../" * 1365,
    ),
)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
awkward = st.text(
    "aAbBiIsSkK.-_~!%/\\:0 éÉ\u0301ß\u0131\u0130\u212a\u017f\u202e\0\n", min_size=1, max_size=14
)
twisted = (
    st.sampled_from(NASTY)
    .flatmap(
        lambda text: st.sampled_from(
            [
                text.upper(),
                text.lower(),
                text.swapcase(),
                text + ".",
                "." + text,
                text + " ",
                text * 2,
            ]
            + [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
            + [paths.encode(text)]
        )
    )
    .filter(lambda text: len(text.encode()) <= paths.MAX_ID_BYTES)
)
any_id = st.one_of(texts, awkward, twisted, st.sampled_from(NASTY))


def foldings(name: str) -> set[str]:
    """What a name is to disks that fold case, normalise, or do both."""
    folded = set()
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for fold in (str.casefold, str.upper, str.lower):
            folded.add(form + unicodedata.normalize(form, fold(unicodedata.normalize(form, name))))
    return folded


WINDOWS_RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$|clock\$)", re.IGNORECASE
)
GIT_REFUSES = re.compile(r"\.git|git~[0-9]+|\.git[. ]*", re.IGNORECASE)


def what_is_wrong(name: str, ending: str) -> str | None:
    """Why a name would be trouble on Linux, Windows, a Mac or in git."""
    whole = name + ending
    if len(whole.encode()) + len(".tmp-") > 255:
        return "too long"
    if re.search(r'[\x00-\x1f\x7f<>:"/\\|?* ]', whole) or not whole.isascii():
        return "a character that some system refuses"
    if whole.endswith((".", " ")) or whole.startswith("."):
        return "a dot or a blank at an end"
    stem = whole.split(".")[0].rstrip()
    if WINDOWS_RESERVED.fullmatch(stem) and stem.lower() != "clock$":
        return "reserved by Windows"
    if GIT_REFUSES.fullmatch(whole):
        return "git would not check it out"
    return None


@ROW
@pytest.mark.timeout(300)
def test_no_two_ids_share_a_name_and_none_leaves_the_root(
    tally: Tally, full: bool, tmp_path: Path
) -> None:
    seen: dict[tuple[bool, str], str] = {}
    root = tmp_path.resolve()

    def look(ident: str) -> None:
        tally.points += 1
        for directory, endings in ((False, (".json", ".jsonl", ".lock")), (True, ("",))):
            name = paths.encode(ident, directory=directory)
            for ending in endings:
                assert what_is_wrong(name, ending) is None, (ident, name + ending)
                path = (root / (name + ending)).resolve()
                assert path.parent == root, (ident, path)
            for folded in foldings(name):
                other = seen.setdefault((directory, folded), ident)
                assert other == ident, f"{ident!r} and {other!r} are both {name}"
            back = paths.decode(name, directory=directory)
            assert back == (ident if paths.carries(name) else None), (ident, name, back)

    for ident in dict.fromkeys(NASTY):
        look(ident)

    @seed(18)
    @settings(
        max_examples=10_000 if full else 400,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(any_id)
    def many(ident: str) -> None:
        look(ident)

    many()


@ROW
@pytest.mark.parametrize("kind", [FileStateStore, WALStateStore], ids=["shared", "exclusive"])
async def test_every_nasty_id_is_stored_listed_loaded_and_deleted(
    tmp_path: Path, tally: Tally, full: bool, kind: type[FileStateStore]
) -> None:
    idents = list(dict.fromkeys(NASTY))
    keys: list[Key] = [(ident,) for ident in idents]
    keys += [(ident, "inner") for ident in idents]
    keys += [(ident, other) for ident, other in zip(idents, reversed(idents), strict=True)]
    keys = list(dict.fromkeys(keys if full else [*keys[::3], *keys[-40:]]))
    root = tmp_path / "outer" / "state"
    async with StatePersistenceManager(store=kind(root, durability="os")) as manager:
        await asyncio.gather(
            *(manager.save("notes", key, {"n": n}) for n, key in enumerate(keys)),
            *(manager.append("notes", key, {"n": n}) for n, key in enumerate(keys)),
        )
        tally.acknowledged += 2 * len(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["outer"]
    assert list((tmp_path / "outer").iterdir()) == [root]
    async with StatePersistenceManager(store=kind(root, durability="os")) as manager:
        listed = await manager.keys("notes")
        tally.points += len(keys)
        tally.lost += len(set(keys) - set(listed))
        assert sorted(listed) == sorted(keys)
        assert sorted(await manager.store.logs("notes")) == sorted(keys)
        assert {loaded.key async for loaded in manager.scan("notes")} == set(keys)
        for n, key in enumerate(keys):
            loaded = await manager.load("notes", key)
            assert loaded is not None
            assert loaded.model_dump()["n"] == n, key
            assert [e.record["n"] async for e in manager.read_log("notes", key)] == [n], key
        assert manager.incidents() == []
        for key in keys:
            assert await manager.delete("notes", key)
        assert await manager.keys("notes") == []
    files = [path for path in root.rglob("*.json") if "notes" in path.relative_to(root).parts[:1]]
    assert files == []


@ROW
async def test_git_takes_every_nasty_id_and_would_check_it_out_on_windows(
    tmp_path: Path, tally: Tally
) -> None:
    async with StatePersistenceManager(tmp_path, durability="os") as manager:
        for n, ident in enumerate(dict.fromkeys(NASTY)):
            await manager.save("notes", (ident, ident), {"n": n})
            tally.points += 1

    def git(*words: str) -> str:
        safe = ("-c", "core.protectNTFS=true", "-c", "core.protectHFS=true")
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0")
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
        done = subprocess.run(
            ["git", *safe, *who, *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        return done.stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    tracked = [name for name in git("ls-files", "-z").split("\0") if name.startswith("notes/")]
    assert len(tracked) == len(set(NASTY))
    assert len({name.casefold() for name in tracked}) == len(tracked)
    before = {name: json.loads((tmp_path / name).read_bytes())["n"] for name in tracked}
    for name in tracked:
        (tmp_path / name).unlink()
    git("checkout", "-q", "--", ".")
    after = {name: json.loads((tmp_path / name).read_bytes())["n"] for name in tracked}
    assert after == before

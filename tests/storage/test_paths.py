"""Ids as file names: reversible, contained, and never two on one name."""

from __future__ import annotations

import unicodedata
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_state import InvalidKeyError
from agent_state.storage import paths
from agent_state.testing.contract_base import NASTY_IDS

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
    lambda text: len(text.encode()) <= paths.MAX_ID_BYTES
)
awkward = st.text("aAbB.-_~!%/\\:0 é\u0301e\0", min_size=1, max_size=12)
any_id = ids | awkward | st.sampled_from(NASTY_IDS)


def name_of(ident: str, *, directory: bool = False) -> str:
    return paths.encode(ident, directory=directory)


def as_seen_by_a_mac(name: str) -> str:
    """One spelling for all names that a case-folding, normalising disk takes for one."""
    return unicodedata.normalize("NFD", name).casefold()


@given(any_id, st.booleans())
def test_a_name_gives_its_id_back_or_says_that_the_file_must(ident: str, directory: bool) -> None:
    name = name_of(ident, directory=directory)

    if paths.carries(name):
        assert paths.decode(name, directory=directory) == ident
    else:
        assert paths.decode(name, directory=directory) is None


@given(any_id, any_id, st.booleans())
@example("alice", "Alice", False)
@example("é", "e\u0301", False)
@example("!a", "A", False)
@example("%41", "A", False)
def test_two_ids_never_share_a_name_on_any_disk(one: str, other: str, directory: bool) -> None:
    if one == other:
        return
    names = [name_of(ident, directory=directory) for ident in (one, other)]

    assert as_seen_by_a_mac(names[0]) != as_seen_by_a_mac(names[1])


@given(any_id, any_id)
def test_a_folder_never_stands_in_the_way_of_a_file(one: str, other: str) -> None:
    folder = name_of(one, directory=True)
    for ending in (paths.DOCUMENT, paths.LOG):
        assert as_seen_by_a_mac(folder) != as_seen_by_a_mac(name_of(other) + ending)


@given(any_id, st.booleans())
def test_a_name_is_plain_short_and_stays_where_it_is(ident: str, directory: bool) -> None:
    name = name_of(ident, directory=directory)

    assert 0 < len(name.encode() + b".jsonl") <= 255
    assert name.isascii()
    assert name == name.lower()
    assert not set(name) & set('/\\:*?"<>|\0 ')
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert not name.endswith((".", " "))
    assert name.partition(".")[0] not in {"con", "prn", "aux", "nul", "com1", "lpt9", "conin$"}


@given(st.lists(any_id, min_size=1, max_size=3).map(tuple))
def test_a_path_goes_down_from_the_kind_and_nowhere_else(key: tuple[str, ...]) -> None:
    path = paths.relative("notes", key, paths.DOCUMENT)

    parts = path.split("/")
    assert parts[0] == "notes"
    assert len(parts) == len(key) + 1
    assert not {"", ".", ".."} & set(parts)
    assert path.endswith(".json")


@given(st.text(max_size=40))
def test_no_file_name_whatever_is_read_as_two_ids(name: str) -> None:
    for directory in (False, True):
        ident = paths.decode(name, directory=directory)
        assert ident is None or name_of(ident, directory=directory) == name


def test_plain_ids_stay_readable() -> None:
    assert name_of("alice") == "alice"
    assert name_of("task-01_b.v2") == "task-01_b.v2"
    assert name_of("Alice") == "!alice"
    assert name_of("../../etc/passwd") == "%2e./../etc/passwd".replace("/", "%2f")
    assert name_of("a/b") == "a%2fb"
    assert name_of(".hidden") == "%2ehidden"
    assert name_of("é") == "%c3%a9"
    assert name_of("x.json", directory=True) == "x%2ejson"


def test_long_and_reserved_ids_keep_a_readable_stem() -> None:
    assert name_of("con").startswith("con~")
    assert name_of("nul.txt").startswith("nul~")
    assert name_of("report " * 60).startswith("report%20report%20")
    assert len({name_of("x" * size) for size in range(100, 300)}) == 200


@pytest.mark.parametrize("ident", ["", "x" * 4097, "é" * 2049, "\ud800", "a\udfffb"])
def test_what_is_no_id_is_refused(ident: str) -> None:
    with pytest.raises(InvalidKeyError):
        name_of(ident)


def test_four_kibibytes_are_an_id() -> None:
    assert name_of("x" * 4096)


@pytest.mark.parametrize("other", [None, 7, b"alice", ("alice",)])
def test_what_is_not_text_is_no_id(other: object) -> None:
    with pytest.raises(InvalidKeyError):
        paths.relative("notes", (other,), ".json")  # type: ignore[arg-type]


def test_all_nasty_ids_together_have_names_of_their_own() -> None:
    for directory in (False, True):
        names = [as_seen_by_a_mac(name_of(ident, directory=directory)) for ident in NASTY_IDS]
        assert len(set(names)) == len(NASTY_IDS)


def test_names_of_all_short_strings_differ() -> None:
    alphabet = "aA.~!%"
    texts = ["".join(letters) for size in (1, 2, 3) for letters in product(alphabet, repeat=size)]

    names = {as_seen_by_a_mac(name_of(text)) for text in texts}

    assert len(names) == len(texts)

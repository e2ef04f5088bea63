"""Secrets are taken out of everything that is recorded, and nothing else is.

The secrets here are put together while the test runs, so that none stands in the source.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.errors import StateValidationError, StorageError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.redact import (
    _FIELDS,
    Allowlist,
    KeywordFilter,
    SecretRedactor,
    SecretRule,
    python_regex,
)

REDACTOR = SecretRedactor.default()


@pytest.fixture(autouse=True)
def no_cached_regexes() -> None:
    """A mutated function must run again: see ``make test-mutants``."""
    python_regex.cache_clear()


MIXED = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8Qr9St0Uv1Wx2Yz3"
UPPER = "ABCDEFGHIJKLMNOP"
B64 = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
BEGIN, END = "-----BEGIN RSA " + "PRIVATE KEY-----", "-----END RSA " + "PRIVATE KEY-----"
JWT = ".".join(("ey" + "JhbGciOiJIUzI1NiJ9", "ey" + "JzdWIiOiIxMjM0In0", MIXED))

SECRETS = [
    "sk-" + "proj-" + MIXED,
    "sk-" + MIXED,
    "sk-" + "test-0000fake0000fake0000",
    "sk-" + "ant-api03-" + MIXED,
    "AI" + "za" + ("Sy" + MIXED)[:35],
    "gh" + "p_" + MIXED[:36],
    "gh" + "o_" + MIXED[:36],
    "github_" + "pat_" + MIXED,
    "gl" + "pat-" + MIXED[:20],
    "xo" + "xb-1234567890-" + MIXED[:24],
    "AK" + "IA" + UPPER,
    "sk_" + "live_" + MIXED[:24],
    "rk_" + "test_" + MIXED[:24],
    "wh" + "sec_" + MIXED[:32],
    "hf" + "_" + MIXED[:34],
    "np" + "m_" + MIXED[:36],
    "py" + "pi-AgEIcHlwaS5vcmc" + MIXED + MIXED,
    "SG" + "." + MIXED[:22] + "." + (MIXED + MIXED)[:43],
    "123456789" + ":AA" + MIXED[:33],
    "gs" + "k_" + MIXED,
    JWT,
    BEGIN + "\n" + B64 + "\n" + B64 + "\nshort==\n" + END,
    BEGIN + "\\n" + B64 + "\\n" + B64 + "\\n" + END,
    BEGIN + "\n" + B64 + "\n" + B64[:7],
]

SENTENCES = [
    'password = "{}"',
    'password="{}"',
    "password: '{}'",
    '"password": "{}"',
    '\\"password\\": \\"{}\\"',
    "DB_PASSWORD={}",
    "export DB_PASSWORD={} && run",
    "psql --password {}",
    "db.password={}",
    "passwd: {}",
    "postgresql://app:{}@db:5432/x",
    "redis://:{}@localhost",
    "amqp://u:{}@h/%2f and more",
]


def record(text: str = "", **more: Any) -> JsonObject:
    return {
        "Id": "id",
        "Timestamp": "2026-03-02T09:00:00.000000Z",
        "SpeakerName": "ada",
        "SpeakerRole": "Agent",
        "Message": text,
        "ConversationType": 0,
        "ContextId": "c",
        "Metadata": {},
        **more,
    }


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:12])
@pytest.mark.parametrize(
    "around", ["{}", "Use {} for it.", 'key="{}",', "({})", "https://x/?k={}&b"]
)
def test_a_secret_is_replaced_and_what_is_around_it_stays(secret: str, around: str) -> None:
    text = REDACTOR.redact_text(around.format(secret))
    before, after = around.split("{}")
    assert re.fullmatch(rf"{re.escape(before)}\[redacted:[a-z_]+\]{re.escape(after)}", text)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("password", ["hunter2!", "p4ss-w0rd_x"])
def test_a_password_is_replaced_where_it_is_given(sentence: str, password: str) -> None:
    text = REDACTOR.redact_text(sentence.format(password))
    assert password not in text
    before, after = sentence.split("{}")
    assert text.startswith(before)
    assert text.endswith(after)


@pytest.mark.parametrize(
    "text",
    [
        f"api_key={MIXED}",
        f"apiKey: '{MIXED}'",
        f"x-api-key: {MIXED}",
        f"client_secret = {MIXED}",
        f"token: {MIXED}",
        f"token          = '{MIXED}'",
        f"secret\t:= {MIXED}",
        f"TOKEN={MIXED}",
        f"aws_secret_access_key = {MIXED[:20]}/{MIXED[:19]}",
        f"aws_secret_access_key = {MIXED[:20]}\\/{MIXED[:19]}",
        f"Authorization: Bearer {MIXED}",
        f"authorization: Basic {MIXED}==",
        f"'Authorization': 'token {MIXED}'",
        f"the bearer {MIXED}",
        f"--api-key {MIXED}",
    ],
)
def test_what_is_assigned_to_a_secrets_name_is_replaced(text: str) -> None:
    redacted = REDACTOR.redact_text(text)
    assert MIXED[:19] not in redacted
    assert "[redacted:" in redacted


INNOCENT = [
    "the token budget: 4000, of which 61 % are used",
    "max_tokens=4096 and token=4000",
    "The password reset is broken; password: must be at least 12 characters.",
    "Secret: none. Token: lease. Credentials are with the vendor.",
    "Which key? The primary key: user_id.",
    "bearer of bad news; basic authorization is required",
    "Authorization: required",
    "token = self.lexer.next_token()",
    "token = parse(source[12:80])",
    "password = getpass.getpass()",
    "login(user=user, password=password, token=token)",
    "password: string, token: string | null",
    '{"type": "object", "properties": {"count": {"type": "string"}}}',
    "password=${DB_PASSWORD} and password=$PASSWORD, https://u:${PASSWORD}@h",
    "postgresql://app:<password>@db/x, http://user:{password}@h",
    "https://example.org/a:b/c?d=e@f and http://h:8080/x@y, ada@example.org",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b in main",
    "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk",
    "the task-force-of-eleven-people-in-task-12345678901234567890",
    "risk-management-and-desk-research-for-2026",
    "sk-learn and scikit-learn; the disk-encryption-setup-of-the-new-machines",
    "It begins with " + BEGIN + " or it is none.",
    "xox is a game; the AKIA prefix; an eyJ at the start; hf_hub_download(repo_id)",
    "npm_config_cache=/tmp npm_lifecycle_event=test",
    "SG.com; at 12:AA; pypi-server and github_patch",
    "keyword: design, keys: [a, b], key=value",
    "the key point: task-42 keeps the token in storage/token_file.py = done",
    "token_count: 12345, fencing_token: 42, next_token='3'",
    "C:\\Users\\token\\new",
]


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert REDACTOR.redact_text(text) == text
    said = record(text, Content={"text": text, "more": [text]}, Metadata={"note": text})
    before = json.dumps(said)
    assert REDACTOR.redact(said) == 0
    assert json.dumps(said) == before


def test_every_place_of_a_record_is_looked_at() -> None:
    key = "sk-" + MIXED
    said = record(
        f"a {key}",
        SpeakerName=f"ada {key}",
        ContextId=key,
        Content={"text": f"a {key}", "list": [{"deep": key}], key: 1},
        Metadata={"note": key, "n": 5, "none": None},
    )
    assert REDACTOR.redact(said) == 7
    assert key not in json.dumps(said)
    mark = "[redacted:openai_key]"
    assert said["Content"] == {"text": f"a {mark}", "list": [{"deep": mark}], mark: 1}
    assert said["Metadata"] == {"note": mark, "n": 5, "none": None}
    assert (said["Id"], said["Timestamp"]) == ("id", "2026-03-02T09:00:00.000000Z")


@pytest.mark.parametrize("field", _FIELDS)
def test_a_secret_in_one_field_alone_is_found(field: str) -> None:
    said = record(**{field: f"it is sk-{MIXED}"})
    assert REDACTOR.redact(said) == 1
    assert said[field] == "it is [redacted:openai_key]"


def test_all_secrets_of_an_object_are_counted() -> None:
    key = "sk-" + MIXED
    said = record(Content={key: key, "password": key, "list": [key, key], "more": {"a": key}})
    assert REDACTOR.redact(said) == 6


def test_keys_that_become_one_are_all_kept() -> None:
    said = record(Content={"sk-" + MIXED: 1, "sk-" + MIXED[::-1]: 2, "sk-" + MIXED[1:]: 3})
    assert REDACTOR.redact(said) == 3
    mark = "[redacted:openai_key]"
    assert said["Content"] == {mark: 1, f"{mark}_": 2, f"{mark}__": 3}


@pytest.mark.parametrize(
    "key",
    [
        *("password", "Password", "api_key", "apiKey", "API-KEY", "client_secret"),
        *("clientSecret", "access_token", "Authorization", "X-Api-Key", "OPENAI_API_KEY"),
        *("db.password", "cookie", "my-app secret access key"),
    ],
)
def test_what_stands_under_a_secrets_name_is_replaced(key: str) -> None:
    redactor = SecretRedactor.default()  # which knows no key yet
    said = record(Metadata={"deep": {key: "any text"}, "list": [{key: ["a", "b"]}]})
    assert redactor.redact(said) == 3
    assert "any text" not in json.dumps(said)
    assert redactor.redact(said) == 0


@pytest.mark.parametrize("key", ["token_count", "keyword", "passwords_ok", "tokens", "monkey"])
def test_other_names_are_left_alone(key: str) -> None:
    said = record(Metadata={key: "any text", "password": 5, "token": None, "secret": ""})
    assert REDACTOR.redact(said) == 0


def test_an_object_that_is_text_is_read_as_one() -> None:
    text = json.dumps({"message": "x", "password": "two words"})
    assert json.loads(REDACTOR.redact_text(text)) == {
        "message": "x",
        "password": "[redacted:password]",
    }
    said = record(text, Content=json.loads(text))
    assert REDACTOR.redact(said) == 2
    assert "two words" not in json.dumps(said)


def test_escapes_of_json_do_not_hide_a_secret() -> None:
    key = "sk-" + "proj-" + MIXED
    spelt = "".join(f"\\u{ord(char):04x}" for char in key)
    for text in (spelt, f'torn {{"a": "{spelt}', key.replace("-", "\\u002d")):
        redacted = REDACTOR.redact_text(text)
        assert "[redacted:openai_key]" in redacted
        assert spelt not in redacted


def test_a_torn_line_is_redacted_as_text() -> None:
    line = f'{{"sender_id":"ada","content":"use sk-{MIXED} and'
    assert REDACTOR.redact_text(line) == (
        '{"sender_id":"ada","content":"use [redacted:openai_key] and'
    )


pieces = st.sampled_from(
    [
        *(*SECRETS, *INNOCENT, *(s.format("hunter2!") for s in SENTENCES)),
        *("password", "token", "=", ": ", '"', "'", "\\", "\\u00", "{", "}", "@", "://"),
        "[redacted:",
    ]
)


@given(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=6).map("".join))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = REDACTOR.redact_text(text)
    assert REDACTOR.redact_text(once) == once
    said = record(text, Content={"a": [text], text: "x"})
    REDACTOR.redact(said)
    before = json.dumps(said)
    assert REDACTOR.redact(said) == 0
    assert json.dumps(said) == before


@given(st.sampled_from(SECRETS), st.text(alphabet=" .,;:()[]<>!?\n\té—", max_size=10))
def test_a_secret_is_found_between_any_signs(secret: str, sign: str) -> None:
    assert secret[-12:] not in REDACTOR.redact_text(f"a{sign} {secret} {sign}b")


# -- the patterns as data ---------------------------------------------------------------------


def shipped() -> list[dict[str, Any]]:
    folder = resources.files("agent_state_integrations.recorder")
    text = folder.joinpath("secret_rules.toml").read_text("utf-8")
    found: list[dict[str, Any]] = tomllib.loads(text)["rules"]
    return found


@pytest.mark.parametrize("pattern", shipped(), ids=lambda pattern: str(pattern["id"]))
def test_no_pattern_goes_back_over_an_unbounded_length(pattern: dict[str, Any]) -> None:
    def repeats(node: Any) -> list[Any]:
        found = []
        for operator, value in node:
            if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
                found.append(value[1])
            below = [value]
            while below:
                item = below.pop()
                if isinstance(item, _parser.SubPattern):
                    found += repeats(item)
                elif isinstance(item, list | tuple):
                    below.extend(item)
        return found

    assert _constants.MAXREPEAT not in repeats(_parser.parse(pattern["regex"]))
    assert pattern["keywords"]


TRAPS = ["-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\n" + "A" * 17, "eyJ-", "sk-"]
TRAPS += ["eyJaaaaaaaaa.eyJaaaa.", "://", "://a:", "://a:@", "token=", "token=a1b2c3d4", "bearer -"]
TRAPS += ["password=a1!", "authorization: basic ", "A_SECRET=", "\\u00", "\\u002d", "\\", "SG.aa"]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_megabyte_made_to_be_slow_is_read_in_one_go(trap: str) -> None:
    # With a regex that looks back over all of it this would take hours.
    text = "password token sk- eyj :// bearer " + trap * (1_000_000 // len(trap)) + "(\x00"
    once = REDACTOR.redact_text(text)
    assert once.endswith("(\x00")


def test_a_user_adds_replaces_and_disables(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'keys = ["door code"]\n[extend]\ndisabledRules = ["aws_key"]\n'
        '[[rules]]\nid = "badge"\nregex = "BADGE-[0-9]{4}"\nkeywords = ["BADGE-"]\n'
        '[[rules]]\nid = "room"\nregex = "room ([0-9]{3})"\n'
        '[[rules]]\nid = "gitlab_token"\nregex = "nothing"\nkeywords = ["nothing"]\n'
    )
    redactor = SecretRedactor.default(path)
    assert (
        redactor.redact_text("BADGE-1234 in room 101") == "[redacted:badge] in room [redacted:room]"
    )
    assert redactor.redact_text("AK" + "IA" + UPPER) == "AK" + "IA" + UPPER
    assert redactor.redact_text("gl" + "pat-" + MIXED) == "gl" + "pat-" + MIXED
    said = record(Metadata={"doorCode": "1234"})
    assert redactor.redact(said) == 1
    assert redactor.redact_text("sk-" + MIXED) == "[redacted:openai_key]"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not toml", "not TOML"),
        ("colour = 1", "colour: Extra inputs"),
        ('[extend]\ndisabledRules = ["no_such"]', "no_such"),
        ("rules = 5", "rules: Input should be a valid tuple"),
        ('[[rules]]\nid = "Bad Name"\nregex = "a"', r"rules\[1\].id: String should match"),
        ('[[rules]]\nid = "a"', "a: a rule has a regex"),
        ('[[rules]]\nid = "a"\nregex = "("', "a: not a regex"),
        ('[[rules]]\nid = "a"\nregex = "b*"', "a: the regex matches the empty text"),
        ('[[rules]]\nid = "a"\nregex = "redacted"', "its own replacement"),
        ('[[rules]]\nid = "a"\nregex = "b"\nkeywords = "b"', r"rules\[1\].keywords"),
        ('[[rules]]\nid = "a"\nregex = "b"\ncolour = 1', r"rules\[1\].colour: Extra inputs"),
        ("keys = [1]", "keys"),
        ('[[rules]]\nid = "a"\nregex = "b"\nwithin = 5', "a: within needs signs"),
        (
            '[[rules]]\nid = "a"\nregex = "b"\nalone = 1',
            r"rules\[1\].alone: Input should be a valid boolean",
        ),
    ],
)
def test_a_file_that_is_wrong_says_what_and_where(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(StateValidationError, match=why) as caught:
        SecretRedactor.default(path)
    assert caught.value.path == str(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        SecretRedactor.default(tmp_path / "missing.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xff")
    with pytest.raises(StateValidationError, match="UTF-8"):
        SecretRedactor.default(path)


# -- the filter -------------------------------------------------------------------------------

RULES = {rule.id: rule for rule in REDACTOR.rules}


def texts_with(rule: SecretRule, word: str) -> list[str]:
    """Texts in which the keyword stands as the rule asks for, at the start, inside, at the end."""
    signs = rule.signs or ("",)
    return [f"{before}{word}{sign}x" for before in ("", "see ", "a\n") for sign in signs]


@pytest.mark.parametrize("name", RULES)
def test_the_filter_lets_everything_through_that_a_rule_looks_at(name: str) -> None:
    rule = RULES[name]
    for chosen in ([rule], list(RULES.values())):
        keywords = KeywordFilter(chosen, [])
        for word in rule.keywords:
            for text in texts_with(rule, word):
                assert rule.may_match(text)
                assert keywords.may_match(text), (word, text)


def test_the_filter_lets_the_names_of_secrets_in_json_through() -> None:
    keywords = KeywordFilter([], ["pwd", "api key", "secret access key"])
    assert keywords.may_match('{"secret_access_key":1}')
    assert keywords.may_match('{"pwd":1}')
    assert keywords.may_match(r"{\"api_key\":1}")
    assert keywords.may_match('"x-api-key"')
    assert keywords.may_match("\\u0070wd")  # spelt with an escape
    assert not keywords.may_match("pwd and the api key are words")


@pytest.mark.parametrize(
    "text",
    ["", "Hello, how are you today?", "The task is done: 3 of 4 (75 %).", "keyboard", "tokens"],
)
def test_what_contains_no_keyword_is_not_searched(text: str) -> None:
    assert not SecretRedactor.default()._filter.may_match(text.lower())


def test_a_rule_without_keywords_is_tried_on_every_text() -> None:
    rule = SecretRule("mine", python_regex("m[0-9]{3}"))
    other = SecretRule("other", python_regex("x"), keywords=("xyz",))
    assert KeywordFilter([rule, other], []).may_match("anything")
    assert not KeywordFilter([other], []).may_match("anything")
    assert SecretRedactor([rule]).redact_text("m123") == "[redacted:mine]"


def test_keywords_that_contain_one_another_are_each_found() -> None:
    words = ("aa_b", "ca_b", "da_b", "ea_b", "fa_b", "a_b", "zz")
    keywords = KeywordFilter([SecretRule("mine", python_regex("x"), keywords=words)], [])
    for word in words:
        assert keywords.may_match(f"is {word} here")
        assert not keywords.may_match(f"is {word[:-1]} here {word[-1]}")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"pwd: \xffpl", "pwd: \\xffpl"),
        ("half \ud83d", "half \\ud83d"),
        ("gr\u00fcn".encode(), "gr\u00fcn"),
        (("sk-" + MIXED).encode() + b"\xff", "[redacted:openai_key]\\xff"),
        ("sk-" + MIXED + "\ud83d", "[redacted:openai_key]\\ud83d"),
    ],
)
def test_data_that_is_no_text_becomes_text_without_its_secrets(raw: bytes | str, text: str) -> None:
    assert REDACTOR.redact_raw(raw) == text


# -- the files of gitleaks --------------------------------------------------------------------


def with_rules(tmp_path: Path, text: str) -> SecretRedactor:
    path = tmp_path / ".gitleaks.toml"
    path.write_text(text)
    return SecretRedactor.default(path)


def test_a_gitleaks_file_is_read_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    redactor = with_rules(
        tmp_path,
        """
title = "ours"
minVersion = "v8.25.0"
[extend]
useDefault = true
disabledRules = ["openai_key"]
[[rules]]
id = "acme-token"
description = "a token of Acme"
regex = '''acme_(?i)[a-z]{2}|zz_(live|test)_([0-9]{4})'''
secretGroup = 0
keywords = ["acme_", "zz_"]
tags = ["key"]
[[rules]]
id = "acme-file"
path = '''(?i)acme\\.p12$'''
[[rules]]
id = "high"
regex = '''high=([[:alnum:]]{8})\\z'''
entropy = 2.5
[[rules.allowlists]]
stopwords = ["example"]
regexTarget = "match"
regexes = ['''=abcdefgh''']
[[allowlists]]
targetRules = ["acme-token"]
regexes = ['''^acme_QQ$''']
""",
    )
    found = redactor.redact_text
    assert (
        found("acme_Xy and ACME_xy and acme_QQ") == "[redacted:acme-token] and ACME_xy and acme_QQ"
    )
    assert found("zz_live_1234") == "zz_[redacted:acme-token]_1234"
    assert found("high=a1b2c3d4") == "high=[redacted:high]"
    assert found("high=aaaaaaab") == "high=aaaaaaab", "its entropy is low"
    assert found("high=abcdefgh") == "high=abcdefgh"
    assert found("high=example1") == "high=example1"
    assert found("sk-" + MIXED) == "sk-" + MIXED
    assert "acme-file is about files" in caplog.text


TEXT = "first line\nfirst\nacme_1234 is shown here\nlast\nlast line"


@pytest.mark.parametrize(
    ("allowlist", "allowed"),
    [
        ({}, False),
        ({"regexes": ["^1234$"]}, True),
        ({"regexes": ["acme"]}, False),
        ({"regexes": ["^acme_1234$"], "regexTarget": "match"}, True),
        ({"regexes": ["^acme_1234 is shown here$"], "regexTarget": "line"}, True),
        ({"regexes": ["first|last"], "regexTarget": "line"}, False),
        ({"regexes": ["no", "12"]}, True),
        ({"stopwords": ["X", "123"]}, True),
        ({"stopwords": ["x"]}, False),
        ({"stopwords": ["x"], "regexes": ["12"]}, True),
        ({"stopwords": ["x"], "regexes": ["12"], "condition": "AND"}, False),
        ({"stopwords": ["x"], "regexes": ["12"], "condition": "&&"}, False),
        ({"stopwords": ["2"], "regexes": ["12"], "condition": "AND"}, True),
        ({"paths": ["1"]}, False),
        ({"commits": ["1"]}, False),
        ({"paths": ["1"], "regexes": ["12"]}, True),
        ({"paths": ["1"], "regexes": ["12"], "condition": "AND"}, False),
        ({"commits": ["1"], "regexes": ["12"], "condition": "AND"}, False),
    ],
)
def test_an_allowlist_is_asked_as_gitleaks_asks_it(
    allowlist: dict[str, Any], allowed: bool
) -> None:
    line = TEXT.splitlines()[2]
    for text in (TEXT, line, f"\n{line}\n"):  # also where there is no other line
        match = re.search("acme_([0-9]+)", text)
        assert match is not None
        assert Allowlist(**allowlist).allows(match, match[1]) is allowed


def test_every_secret_of_a_rule_is_replaced_and_what_is_allowed_between_them_stays(
    tmp_path: Path,
) -> None:
    redactor = with_rules(
        tmp_path,
        """
[[rules]]
id = "pin"
regex = '''pin=(?P<bank>[a-z]+):([0-9]{4})'''
secretGroup = 2
[[rules]]
id = "badge"
regex = '''badge[0-9]'''
[rules.allowlist]
regexes = ["badge0"]
[[rules]]
id = "even"
regex = '''even=([a-z]+)'''
entropy = 1.0
[allowlist]
regexes = ["^0000$"]
[[allowlists]]
targetRules = ["badge"]
regexes = ["^(badge7|1111)$"]
""",
    )
    found, count = redactor._text("pin=a:1234, pin=b:0000, pin=c:1111 and pin=d:5678!")
    assert found == (
        "pin=a:[redacted:pin], pin=b:0000, pin=c:[redacted:pin] and pin=d:[redacted:pin]!"
    )
    assert count == 3
    assert redactor.redact_text("badge0 badge1 badge7") == "badge0 [redacted:badge] badge7"
    assert redactor.redact_text("even=aabb even=aabc") == "even=aabb even=[redacted:even]"


def test_a_keyword_of_the_users_stands_alone_and_near_its_sign(tmp_path: Path) -> None:
    redactor = with_rules(
        tmp_path,
        """
[[rules]]
id = "near"
regex = '''nip.{1,20}?([0-9]{4})'''
keywords = ["nip"]
signs = ["#"]
within = 3
alone = true
""",
    )
    for before in ("", "snip, ", "nip, "):
        assert redactor.redact_text(f"{before}nip #1234").endswith("nip #[redacted:near]")
    assert redactor.redact_text("nip #1234 snip") == "nip #[redacted:near] snip"
    for text in ("snip #1234", "nip is so far #1234", "nip....#1234", "nip a#1234", "nip 1234"):
        assert redactor.redact_text(text) == text


def test_each_text_of_a_list_under_a_secrets_name_is_replaced() -> None:
    said = record(Metadata={"apiKey": ["one", "", 5, ["two"]]})
    assert REDACTOR.redact(said) == 2
    mark = "[redacted:api_key]"
    assert said["Metadata"] == {"apiKey": [mark, "", 5, [mark]]}


@pytest.mark.parametrize("regex", ["^$", "a*", "[[]redacted"])
def test_a_rule_that_matches_nothing_or_its_own_mark_is_refused(tmp_path: Path, regex: str) -> None:
    with pytest.raises(StateValidationError, match="empty text, or its own replacement"):
        with_rules(tmp_path, f"[[rules]]\nid = \"mine\"\nregex = '''{regex}'''\n")


@pytest.mark.parametrize(
    ("re2", "matches", "not_matches"),
    [
        ("a(?i)b|c", ["ab", "aB", "C"], ["AB"]),
        ("x(?:a(?i)b|c)d", ["xaBd", "xCd"], ["xabD", "Xabd"]),
        (r"[[:upper:][:digit:]]+\z", ["A1"], ["a", "A\n"]),
        (r"[^[:space:]x]", ["y"], ["x", " "]),
        (r"[]a[]\x{62}", ["]b", "[b", "ab"], ["]a"]),
        ("[[a&&b||c]+", ["[a&b|c"], ["]", "d"]),
        (r"\Qa.b(\E", ["a.b("], ["axb("]),
        (r"(?<name>a)\d", ["a1"], ["a\u0661"]),
        (r"(?i)secret\[(.)", ["SECRET[x"], ["secret"]),
    ],
)
def test_re2_syntax_is_understood(re2: str, matches: list[str], not_matches: list[str]) -> None:
    regex = python_regex(re2)
    assert all(regex.fullmatch(text) for text in matches)
    assert not any(regex.fullmatch(text) for text in not_matches)


@pytest.mark.parametrize("re2", [r"\pL", r"\p{Greek}", "(?U)a+", "[[:nosuch:]]", "a**", r"\C", "("])
def test_what_python_cannot_run_is_refused_with_the_rule(tmp_path: Path, re2: str) -> None:
    with pytest.raises(StateValidationError, match=r"mine: .*Python can run"):
        with_rules(tmp_path, f"[[rules]]\nid = \"mine\"\nregex = '''{re2}'''\n")


def test_a_text_without_a_keyword_is_not_searched_because_another_text_has_one() -> None:
    searched: list[str] = []

    class Rule(SecretRule):
        def may_match(self, lowered: str) -> bool:
            searched.append(lowered)
            return SecretRule.may_match(self, lowered)

    rule = Rule("mine", python_regex("needle-[0-9]+"), keywords=("needle",))
    redactor = SecretRedactor([rule])
    record: JsonObject = {
        "Message": "a needle-42 in it",
        "Id": "1",
        "SpeakerName": "ada",
        "SpeakerRole": "Agent",
        "ContextId": "c",
        "ConversationType": 0,
        "Metadata": {"notes": ["hay", "hay"], "more": {"a needle-7": "hay"}},
        "Content": {"json": '{"inner": "needle\\u002d13"}'},
    }
    assert redactor.redact(record) == 3
    assert record["Message"] == "a [redacted:mine] in it"
    assert record["Metadata"]["more"] == {"a [redacted:mine]": "hay"}
    assert record["Content"] == {"json": '{"inner":"[redacted:mine]"}'}
    assert not {"hay", "ada", "agent"}.intersection(searched)

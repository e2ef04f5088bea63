"""Bytes that nobody should ever have written, made from bytes that somebody did.

Everything comes from one ``random.Random``: the same seed makes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any
from zlib import crc32

from agent_state.models import SCHEMAS

RESERVED = (
    *("_checksum", "_revision", "_saved_at", "_schema", "_id", "_session_id"),
    *("_seq", "_crc", "_dedupe", "_version"),
)
FIELDS = tuple(dict.fromkeys(name for model in SCHEMAS.values() for name in model.model_fields))
JOURNAL_FIELDS = (
    *("kind", "key", "op", "revision", "saved_at", "schema", "meta", "body", "seq", "dedupe_id"),
)
OPERATIONS = ('"put"', '"delete"', '"append"', '"drop"')

NUMBERS = (
    *("0", "-0", "1", "-1", "1.5", "1e5", "1E+400", "-1e999", "5e-324", "NaN", "Infinity"),
    *("9223372036854775806", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551615", "18446744073709551616", "-9223372036854775809", "1" * 25),
    *("9" * 400, "01", "1_0", "0x1", "1e5.5", "true", "false", "null", "None"),
)
TEXTS = (
    *('""', '"a"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\udfff\\ud800"', '"..\\/x"'),
    *('"agents\\/1"', '"agents\\/0"', '"agents\\/2"', '"task_queues\\/0"', '"tasks\\/99999999999"'),
    *('"\\/"', '"tasks\\/\\u0661"', '"mail_items\\/1"', '"x\\/-1"', '"../../etc\\/1"', '"."'),
    *('"inf"', '"-Infinity"', '"nan"', '"1e999"', '"yes"', '"0"', '"-7"', '" 5 "', '"1_000"'),
    *('"pending"', '"in_progress"', '"99999999999999999999"', '"1' + "0" * 5000 + '"'),
    *('"2026-01-01T00:00:00Z"', '"not a time"', '"' + "x" * 5000 + '"', '"é"', '"\u2028"'),
)
CONTAINERS = ("[]", "{}", "[[]]", '{"":0}', '[null,"a",1]', '{"a":1,"a":2}', "[1,", '{"a"', "[,]")
DEPTHS = (3, 199, 200, 201, 253, 254, 255, 256, 1022, 1024, 1026, 20_000)
NOISE = (
    *(b"\0", b"\0" * 300, b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\n"),
    *(b"\r\n", b"\xe2\x80\xa8", b"\x1a", b'"', b"\\", b"{", b"}", b"[", b",", b"\x85", b" " * 70),
)


class Mutator:
    """Makes one bad input after another out of good ones."""

    def __init__(self, random: Random, seeds: Sequence[bytes]) -> None:
        self.random = random
        self.seeds = seeds

    def damaged(self) -> bytes:
        """A good input with one to four things wrong at the level of bytes."""
        data = self.random.choice(self.seeds)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            data = self._damage(data)
        return data

    def _damage(self, data: bytes) -> bytes:
        random = self.random
        at = random.randrange(len(data) + 1)
        match random.randrange(11):
            case 0 | 1 if data:
                at = min(at, len(data) - 1)
                return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
            case 2:
                return data[:at]
            case 3:
                return data[:at] + random.choice(NOISE) + data[at:]
            case 4:
                other = random.choice(self.seeds)
                return data[:at] + other[random.randrange(len(other) + 1) :]
            case 5:
                return data[:at] + data[at + random.randrange(20) :]
            case 6:
                return data + random.choice(NOISE) * random.choice((1, 1, 40))
            case 7:
                end = min(len(data), at + random.randrange(60))
                return data[:end] + data[at:]
            case 8:
                text = data.decode(errors="replace")
                return text.encode(random.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32")))
            case 9:
                text = random.choice((*NUMBERS, *TEXTS, *CONTAINERS))
                return data[:at] + text.encode(errors="surrogatepass") + data[at:]
            case _:
                return bytes(len(data)) if random.random() < 0.1 else data[at:] + data[:at]

    def value(self, depth: int = 0) -> str:
        """JSON text, or nearly so."""
        random = self.random
        kind = random.randrange(12 if depth < 3 else 7)
        if kind < 3:
            return random.choice(NUMBERS)
        if kind < 6:
            return random.choice(TEXTS)
        if kind == 6:
            return random.choice(CONTAINERS)
        if kind == 7 and random.random() < 0.05:
            return nested(random.choice(DEPTHS), random.choice(("[]", '{"a":}')))
        if kind < 9:
            return "[" + ",".join(self.value(depth + 1) for _ in range(random.randrange(4))) + "]"
        return self.object(FIELDS, depth + 1)

    def object(self, names: Sequence[str], depth: int = 0, least: int = 0) -> str:
        """An object of such keys, some of them given twice."""
        count = least + self.random.randrange(5)
        pairs = [f'"{self.random.choice(names)}":{self.value(depth)}' for _ in range(count)]
        return "{" + ",".join(pairs) + "}"

    def shaped(self, names: Sequence[str]) -> bytes:
        """A good object in which some keys say what they never should."""
        random = self.random
        good = random.choice(self.seeds)
        try:
            content: dict[str, Any] = json.loads(good)
        except ValueError:
            content = {}
        pairs = {json.dumps(name): json.dumps(value) for name, value in content.items()}
        for _ in range(random.choice((1, 1, 2, 3))):
            pairs[f'"{random.choice(names)}"'] = self.value()
        if random.random() < 0.2 and pairs:
            del pairs[random.choice(list(pairs))]
        text = "{" + ",".join(f"{name}:{value}" for name, value in pairs.items()) + "}"
        if random.random() < 0.05:
            text = text[:-1] + f',"{random.choice(names)}":{self.value()}' + "}"
        return text.encode(errors="surrogatepass")

    def document(self) -> bytes:
        return self.shaped((*RESERVED, *FIELDS)) if self.random.random() < 0.6 else self.damaged()

    def line(self) -> bytes:
        return (self.shaped(RESERVED) if self.random.random() < 0.5 else self.damaged())[:-1]

    def record(self) -> bytes:
        """A journal line, mostly with a checksum that fits, so that what is inside is read."""
        random = self.random
        if random.random() < 0.3:
            return self.damaged()
        if random.random() < 0.3:
            inside = self.damaged()[9:].rstrip(b"\n")
        else:
            inside = self._change().encode(errors="surrogatepass")
        return b"%08x %b\n" % (crc32(inside), inside)

    def _change(self) -> str:
        random = self.random
        good: dict[str, Any] = random.choice(json.loads(random.choice(self.seeds)[9:])["changes"])
        pairs = {name: json.dumps(value) for name, value in good.items()}
        for _ in range(random.randrange(3)):
            name = random.choice(JOURNAL_FIELDS)
            pairs[name] = random.choice(OPERATIONS) if name == "op" else self.value()
        if random.random() < 0.1:
            pairs.pop(random.choice(list(pairs)))
        change = "{" + ",".join(f'"{name}":{value}' for name, value in pairs.items()) + "}"
        if random.random() < 0.1:
            return random.choice((change, self.value(), '{"changes":' + change + "}"))
        return '{"changes":[' + ",".join([change] * random.choice((1, 1, 2))) + "]}"

    def lines(self, one: Callable[[], bytes]) -> bytes:
        """A file of such lines, and of good ones."""
        random = self.random
        parts = [
            one() if random.random() < 0.4 else random.choice(self.seeds)
            for _ in range(random.randrange(1, 6))
        ]
        data = b"".join(
            part if part.endswith(b"\n") or random.random() < 0.1 else part + b"\n"
            for part in parts
        )
        return data if random.random() < 0.7 else data[: random.randrange(len(data) + 1)]

    def name(self) -> str:
        random = self.random
        letters = ("a", "Z", "%", "!", "~", ".", "%2", "%2f", "%00", "!a", "%ff", "\udcff", "é")
        more = ("con", "nul.", "/", "..", "%c3%a9", "\u0301", "x" * 150, "~0123456789abcdef", "\0")
        return "".join(random.choice((*letters, *more)) for _ in range(random.randrange(1, 9)))


def nested(levels: int, pair: str) -> str:
    """So many levels of ``[]`` or ``{"a":}``."""
    return pair[:-1] * levels + "0" + pair[-1] * levels


def batches(seed: str, count: int, size: int = 500) -> Iterator[tuple[Random, int]]:
    """Random numbers for so many inputs, afresh for each batch: any of them can be made alone."""
    for start in range(0, count, size):
        yield Random(f"{seed}/{start}"), min(size, count - start)

"""``git diff`` of a document without its noise: ``python -I -S textconv.py FILE``.

It prints the document without checksum, revision and times of saving, one field a line, and a
log's lines without numbers and checksums. What it cannot read it prints as it is. It never fails:
git would show no difference at all.
"""

from __future__ import annotations

import sys

NOISE = ("_checksum", "_revision", "_saved_at", "_schema", "_session_id", "last_active")


def convert(data: bytes) -> str:
    """The text that is compared."""
    here = __file__.rpartition("/")[0] or "."
    if here not in sys.path:
        sys.path.insert(0, here)
    rules = __import__("merge_rules")
    lines = data.decode(errors="replace")
    try:
        content = rules.parse(data)
        if "_seq" not in content or "_checksum" in content:  # else it is a log's only line
            return _text(rules, content) + "\n"
    except rules.UnmergeableError:
        pass
    shown = []
    # ``splitlines`` would cut inside a record.
    for line in lines.removesuffix("\n").split("\n") if lines else ():
        try:
            content = rules.parse(line.encode())
        except rules.UnmergeableError:
            shown.append(line)
            continue
        body = {name: value for name, value in content.items() if name not in rules.LOG_RESERVED}
        shown.append(rules.dump(body | _unpacked(rules, body.pop("_gzip", None))))
    return "".join(f"{line}\n" for line in shown)


def _unpacked(rules: object, packed: object) -> dict[str, object]:
    """The large fields of an archived record, which are stored compressed."""
    if packed is None:
        return {}
    try:
        text = __import__("gzip").decompress(__import__("base64").b64decode(packed))
        return dict(rules.parse(text))  # type: ignore[attr-defined]  # a module by its name
    except Exception:  # noqa: BLE001  # it is damaged: then it is shown as it is
        return {"_gzip": packed}


def _text(rules: object, content: dict[str, object]) -> str:
    shown = {name: value for name, value in content.items() if name not in NOISE}
    return str(rules.dump(shown, "\n"))  # type: ignore[attr-defined]  # a module by its name


def main(path: str) -> int:
    """Print a file's text; 0."""
    data = b""
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # ``pathlib`` takes longer than the rest
            data = file.read()
        text = convert(data).encode()
    except Exception:  # noqa: BLE001  # whatever it is, git must see the file
        text = data
    sys.stdout.buffer.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

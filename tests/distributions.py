"""An installed package with entry points: its modules and its metadata, in a folder to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, group: str, entries: Mapping[str, str], modules: Mapping[str, str]
) -> None:
    """Write a package that has these entry points (name: ``module:object``) and modules."""
    metadata = folder / "added_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: added-package\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)

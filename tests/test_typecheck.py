"""The type checker has read the mapped folders too; `make typecheck` runs this on its own report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def test_every_source_file_was_checked(repository: Path) -> None:
    report = os.environ.get("PYRA_MYPY_REPORT")
    if not report:
        pytest.skip("`make typecheck` runs mypy and names its report in PYRA_MYPY_REPORT")
    lines = (repository / report).read_text(encoding="utf-8").splitlines()
    checked = {line.split()[-1] for line in lines}
    expected = set()
    for package, folder in {
        "pyra": "pyra",
        **{f"pyra.{name}": name for name in ("adapters", "tasks", "scripts")},
    }.items():
        for file in (repository / folder).rglob("*.py"):
            parts = file.relative_to(repository / folder).with_suffix("").parts
            expected.add(".".join([package, *(part for part in parts if part != "__init__")]))
    assert {name.split(".")[1] for name in expected if "." in name} > {"adapters", "tasks", "scripts"}
    assert sorted(expected - checked) == []

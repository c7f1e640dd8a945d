"""The benchmark of the kernels: shapes, bytes, the check before the first number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyra.errors import KernelError
from pyra.scripts import benchmark
from pyra.tasks.benchmarks import kernels
from pyra.tasks.benchmarks.kernels import Shape
from pyra.tasks.benchmarks.subject import Subject

TINY = Shape("vit_tiny_patch16_224", 64, 17, 1, 3, 8, 5)
CPU = torch.device("cpu")


def test_shapes_are_those_of_the_first_layer_that_merges() -> None:
    found = [Shape.of(subject) for subject in kernels.SUBJECTS]
    assert [(shape.tokens, shape.heads, shape.head_dim) for shape in found] == [
        (197, 12, 64),
        (577, 12, 64),
        (197, 16, 64),
        (577, 16, 64),
        (257, 6, 64),
        (1370, 6, 64),
    ]
    assert found[0].removed == 40 and found[2].removed == 20  # as published


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_shape(dtype: torch.dtype) -> None:
    rows = kernels.rows_of(TINY, 2, CPU, dtype, rounds=2, compiled=False, bandwidth=1e9)
    by_name = {(row.measured, row.implementation): row for row in rows}
    assert list(by_name) == [
        *((name, "reference") for name in ("match", "merge", "match, merge, follow")),
        *(("attention", way) for way in ("mask", "augmented", "no bias")),
    ]
    wide = dtype.itemsize
    indices = 8 * 2 * (3 * 5 + 12)
    assert by_name["match", "reference"].bytes_moved == 2 * 17 * 24 * wide + indices + 4 * 2 * 5
    assert by_name["merge", "reference"].bytes_moved == 2 * (17 + 12) * (24 * wide + 4) + indices
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80 and row.unit == "us" and row.goal is None
        assert row.copy_share == pytest.approx(row.bytes_moved / (row.p50 * 1e-6) / 1e9)
    assert set(by_name["merge", "reference"].ratios) == {"eager"}
    assert set(by_name["attention", "augmented"].ratios) == {"mask", "no bias"}


def test_the_check_passes_and_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton has no build for this platform")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.check([TINY], CPU)
    assert "TRITON_INTERPRET" not in kernels.os.environ


def test_nothing_is_timed_where_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        kernels, "_interpreted_problems", lambda shapes: ["ViT at 224 px: merge_tokens: two runs differ"]
    )
    monkeypatch.setattr(kernels, "rows_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(KernelError, match="failed their check, so nothing was timed: ViT at 224 px: merge_tokens: two"):
        benchmark.main(["kernels", "--quick", "--output", str(tmp_path / "rows.json")])
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "check", lambda shapes, device: None)
    monkeypatch.setattr(kernels, "SUBJECTS", [Subject("vit_tiny_patch16_224", 64)] * 5)
    monkeypatch.setattr(kernels, "COPIED", {"cpu": 2**20})
    output = tmp_path / "rows.json"
    assert benchmark.main(["kernels", "--quick", "--no-compile", "--batch-sizes", "2", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "match, merge, follow" in said and f"12 rows in {output}" in said
    (first, *_) = json.loads(output.read_text())["rows"]
    assert torch.__version__.startswith(first["environment"]["torch"]) and first["batch_size"] == 2

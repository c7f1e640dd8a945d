"""What an export costs, and what it keeps of the speed-up: the same model plain and merging, in each runtime, in turns.

Images are those of the demo task; weights are random, which no time depends on.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.backbones import macs, wrap
from pyra.export import export_model, load_exported
from pyra.export.formats import format_named, installed_runtimes
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.benchmarks.subject import Subject
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.task import load_task
from pyra.tasks.timing import Job, spreads
from pyra.tasks.usage import Meter

LEVEL = "high"
KEPT = 0.9
"""Share of the ratio of MACs that a runtime's speed-up is to keep."""
INT8 = 1.5
"""Times that int8 is to be faster than float32 on a CPU with VNNI."""
MINUTE, MEMORY = 60.0, 3.0
"""Seconds, and multiples of the model's bytes, that folding and exporting is to stay under."""
FORMATS = ("onnx", "onnx-int8", "onnx-int8-dynamic")


class Case(NamedTuple):
    """One exported model: its format, and whether its tokens merge."""

    format: str
    merges: bool


def speed_rows(subject: Subject, batch_sizes: Sequence[int], rounds: int) -> list[Row]:
    """Export plain and merging models, and time them in every runtime that is installed.

    Args:
        subject: the model.
        batch_sizes: images a forward.
        rounds: timed forwards of each.
    """
    cases = [Case(format, merges) for format in FORMATS for merges in (False, True)]
    images = demo_images(subject.side(), max(*batch_sizes, 8))
    model = subject.make().eval()
    plain = macs(model)
    wrap(model, subject.merging(LEVEL))
    ratio = plain / macs(model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            _export(subject, case, Path(folder) / _name(case), images)
        for runtime in installed_runtimes(format_named("onnx")):
            for batch_size in batch_sizes:
                rows += _runtime_rows(subject, cases, Path(folder), runtime, images[:batch_size], rounds, ratio)
    return rows


def _runtime_rows(
    subject: Subject, cases: list[Case], folder: Path, runtime: str, batch: Tensor, rounds: int, ratio: float
) -> list[Row]:
    opened = {case: load_exported(folder / _name(case), runtime=runtime) for case in cases}
    jobs: dict[str, Job] = {_name(case): partial(run, batch) for case, run in opened.items()}
    took = spreads(jobs, rounds, 2)
    rows = []
    for case in cases:
        seconds = took[_name(case)]
        ratios, goal = {}, None
        if case.merges and case.format == "onnx":
            goal = KEPT * ratio
        elif case.format != "onnx":
            ratios["float32"] = took[_name(Case("onnx", case.merges))].p50 / seconds.p50
            goal = INT8 if _has_vnni() else None
        if case.merges:
            ratios["plain"] = took[_name(Case(case.format, False))].p50 / seconds.p50
        rows.append(
            Row(
                measured=f"{case.format}, {LEVEL if case.merges else 'plain'}",
                implementation=runtime,
                backbone=subject.backbone,
                image_size=subject.side(),
                batch_size=len(batch),
                dtype="float32" if case.format == "onnx" else "int8",
                unit="images/s",
                p20=len(batch) / seconds.p80,
                p50=len(batch) / seconds.p50,
                p80=len(batch) / seconds.p20,
                ratios=ratios,
                goal=goal,
                reached=None if goal is None else next(iter(ratios.values())) >= goal,
                detail=f"MACs {ratio:.2f} x fewer" if case.merges else "",
            )
        )
    return rows


def cost_rows(subject: Subject) -> list[Row]:
    """Measure seconds and memory of folding LoRA, exporting to ONNX, opening it in each runtime and comparing.

    In a process of its own, after a small export: what the libraries themselves take is not counted.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, grown, size, operators = pool.apply(_cost, (subject,))
    told: dict[str, Any] = {
        "measured": f"export to onnx, {LEVEL}, LoRA folded",
        "implementation": "pyra",
        "backbone": subject.backbone,
        "image_size": subject.side(),
        "batch_size": 4,
        "dtype": "float32",
    }
    share, kinds = grown / size, ", ".join(operators)
    return [
        Row(
            **told,
            unit="s",
            p20=seconds,
            p50=seconds,
            p80=seconds,
            ratios={"minute share": seconds / MINUTE},
            goal=1.0,
            reached=seconds < MINUTE,
            detail=f"operators: {kinds}",
        ),
        Row(
            **told,
            unit="GB",
            p20=grown / 1e9,
            p50=grown / 1e9,
            p80=grown / 1e9,
            ratios={"model share": share},
            goal=MEMORY,
            reached=share < MEMORY,
            detail=f"more than before, at the peak; the model has {size / 1e9:.3f} GB",
        ),
    ]


def _cost(subject: Subject) -> tuple[float, float, float, list[str]]:
    small = Subject("vit_tiny_patch16_224", 32)
    with tempfile.TemporaryDirectory() as folder:
        export_model(small.make(), Path(folder) / "small", example_input=demo_images(32, 4))
        model = adapt(subject.make(), pyra=subject.merging(LEVEL), peft=peft_config("lora", 8)).eval()
        images = demo_images(subject.side(), 4)
        meter = Meter(torch.device("cpu")).start()
        before = _resident()
        report = export_model(model, Path(folder) / "model", example_input=images)
        peak = meter.stop().peak_memory_bytes or before
    size = sum(parameter.nbytes for parameter in model.parameters())
    return report.seconds, peak - before, float(size), sorted(report.operators)


def _has_vnni() -> bool:
    """Whether this CPU sums products of 8-bit numbers in one instruction; False where nothing says so."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _resident() -> float:
    """Return the memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * 4096)


def _export(subject: Subject, case: Case, folder: Path, images: Tensor) -> None:
    model = subject.make().eval()
    if case.merges:
        wrap(model, subject.merging(LEVEL))
    # Random weights say nothing of what rounding does to a trained model, and the comparison is not what is measured.
    export_model(model, folder, case.format, example_input=images[:8], tolerance=1e3 if case.format != "onnx" else None)


def _name(case: Case) -> str:
    return f"{case.format}-{'merging' if case.merges else 'plain'}"


def demo_images(side: int, number: int) -> Tensor:
    """Return [number, 3, side, side] images of the demo task."""
    rows = load_task("demo").splits["train"].select(range(number))
    data = ImageDataset(rows, image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3, name="demo/train", cache=None)
    return torch.stack([data[i]["pixel_values"] for i in range(number)])

"""The demonstration: one small backbone, one task, four ways to adapt it, measured side by side.

Writes ``demo.json`` and ``demo.md`` (the table), ``pareto.png`` and ``pareto.html``, ``merged_tokens.png``, the four
run folders under ``adapted/`` and the best compressed model under ``export/``.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from pyra.files import atomic_path, write_json, write_text
from pyra.tasks.data.task import ImageDataset, Task, load_task
from pyra.tasks.exporting import ExportedRun, export_run
from pyra.tasks.options import RunOptions
from pyra.tasks.output import staged_output
from pyra.tasks.reports import pareto_plot, results_table
from pyra.tasks.results import RunResult
from pyra.tasks.runs import load_run, new_model, resolve_device
from pyra.tasks.timing import throughput
from pyra.tasks.training import run, splits
from pyra.tasks.visualize import draw

METHODS = ("linear", "lora", "tome", "pyra")
COMPRESSED = ("tome", "pyra")
PICTURED = 4


@dataclass(kw_only=True)
class DemoSettings:
    """What the demonstration trains: few epochs, so that it ends within minutes on two cores.

    Learning rates, targets and batch size were picked by hand from about twenty short runs on the validation split, one
    or two seeds each: most of PYRA, some of ToMe and the probe, one of uncompressed LoRA. The probe trains on stored
    features, where epochs cost little: it gets ten times as many.
    """

    rate: float = 0.706  # 3.4 times fewer MACs, the published "high" level
    epochs: float = 3.0
    linear_epochs: float = 30.0
    batch_size: int = 16
    timed_batch_size: int = 64
    rank: int = 8
    targets: str = "qkv,proj,fc1,fc2"
    lr: float = 4e-3
    reactivation_lr: float = 4e-4
    linear_lr: float = 3e-2
    seed: int = 0
    device: str = "auto"
    limit: int | None = None


@dataclass(frozen=True)
class Demonstration:
    """What came out: the rows of the table, the export of the best compressed model, and the seconds it took."""

    rows: list[RunResult]
    exported: ExportedRun
    seconds: float


def demonstrate(folder: str | Path, settings: DemoSettings, overwrite: bool = False) -> Demonstration:
    """Run the demonstration and write ``folder``.

    Raises:
        OutputError: where ``folder`` holds something else, or an earlier demonstration and not ``overwrite``.
    """
    started = time.perf_counter()
    # Everything that can be wrong is found before an earlier demonstration is touched.
    device = resolve_device(settings.device)
    task = load_task("demo")
    for method in METHODS:
        _options(settings, method, Path(folder))
    with staged_output(folder, "demo", overwrite) as staging:
        rows, exported = _demonstrate(staging, Path(folder), settings, task, device)
    exported = dataclasses.replace(exported, folder=Path(folder) / "export")
    return Demonstration(rows, exported, time.perf_counter() - started)


def _demonstrate(
    staging: Path, folder: Path, settings: DemoSettings, task: Task, device: torch.device
) -> tuple[list[RunResult], ExportedRun]:
    """Train, time, draw and export into ``staging``, which becomes ``folder``."""
    data: tuple[ImageDataset, ImageDataset] | None = None
    rows = []
    for number, method in enumerate(METHODS, start=1):
        print(f"[{number}/{len(METHODS)}] {method}", flush=True)
        options = _options(settings, method, folder / "adapted" / method)
        set_seed(settings.seed)
        model = new_model(options, len(task.labels))
        data = data or splits(options, task, model)
        (staging / "adapted" / method).mkdir(parents=True)
        rows.append(run(options, task, model, *data, staging / "adapted" / method, device))
    assert data is not None
    models = {method: load_run(staging / "adapted" / method)[0].to(device) for method in METHODS}
    test_data = data[1]
    rows = _timed_together(rows, models, test_data, settings.timed_batch_size, device)
    best = max((row for row in rows if row.method in COMPRESSED), key=lambda row: row.value)
    print(f"drawing, and exporting {best.method}", flush=True)
    write_json(staging / "demo.json", [row.to_dict() for row in rows])
    write_text(staging / "demo.md", results_table(rows, style="markdown") + "\n")
    pareto_plot(rows, png=staging / "pareto.png", html=staging / "pareto.html", title="Demo: ten kinds of clothing")
    _picture(models[best.method], test_data, staging / "merged_tokens.png")
    return rows, export_run(staging / "adapted" / best.method, staging / "export")


def _options(settings: DemoSettings, method: str, folder: Path) -> RunOptions:
    return RunOptions(
        method=method,
        rate=settings.rate if method in COMPRESSED else None,
        epochs=settings.linear_epochs if method == "linear" else settings.epochs,
        batch_size=settings.batch_size,
        rank=settings.rank,
        targets=settings.targets,
        reactivation_lr=settings.reactivation_lr if method == "pyra" else None,
        lr=settings.linear_lr if method == "linear" else settings.lr,
        dropout=0.0,
        drop_path=0.0,
        seed=settings.seed,
        device=settings.device,
        limit=settings.limit,
        output=str(folder),
    )


def _timed_together(
    rows: list[RunResult], models: dict[str, nn.Module], data: ImageDataset, batch_size: int, device: torch.device
) -> list[RunResult]:
    """Time all models in turns, so that the table compares like with like; LoRA, folded, is the plain backbone."""
    batch = torch.stack([data[i]["pixel_values"] for i in range(min(batch_size, len(data)))]).to(device)
    speeds = throughput(models, batch, rounds=9)
    return [
        dataclasses.replace(
            row,
            images_per_second=speeds[row.method],
            speedup=speeds[row.method] / speeds["lora"],
            throughput_batch_size=len(batch),
        )
        for row in rows
    ]


def _picture(model: Any, data: ImageDataset, path: Path) -> None:
    """Draw what merged in a few test images of different classes."""
    first = {label: index for index, label in reversed(list(enumerate(data.labels)))}
    chosen = [first[label] for label in sorted(first)][:PICTURED]
    drawn = draw(model.cpu(), [data.image(i) for i in chosen])
    with atomic_path(path) as temporary:
        drawn.picture.save(temporary)

"""Compare one elastic adapter with adapters trained at each rate alone; ``python -m pyra.scripts.study_elastic``.

Both are scored on the same test images; the difference is bootstrapped over images and seeds together, in pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.scripts.cli import parse
from pyra.tasks.options import RunOptions, option

DRAWS = 5000


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study; the training settings are the demonstration's."""

    task: str | None = option(None, "a shipped task by name ('demo' unless --data is given)")
    data: str | None = option(None, "your data instead, as for pyra train")
    backbone: str = option("demo", "as for pyra train")
    checkpoint: str | None = option(None, "as for pyra train")
    image_size: int | None = option(None, "as for pyra train")
    method: str = option("pyra", "pyra or tome", choices=("pyra", "tome"))
    rates: tuple[float, ...] = option(
        (0.3, 0.5, 0.7), "rates of the grid; the elastic run covers the lowest to the highest"
    )
    seeds: int = option(3, "runs of each")
    epochs: float = option(3.0, "passes over the training images, the same for every run")
    batch_size: int = option(16, "images a step")
    lr: float = option(4e-3, "peak learning rate")
    reactivation_lr: float = option(4e-4, "peak learning rate of the re-activation weights")
    rank: int = option(8, "rank of LoRA")
    targets: str = option("qkv,proj,fc1,fc2", "modules that LoRA adapts")
    distill: bool = option(False, "the elastic runs learn from the uncompressed pass, too")
    runs: str = option("runs/elastic-study", "folder of the runs; one that is there is not trained again")
    output: str = option("results/elastic-demo.json", "file to write the rows to")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, score everything, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_elastic",
        description="Compare one elastic adapter with adapters trained at each rate alone.",
        example="python -m pyra.scripts.study_elastic --seeds 3 --output results/elastic-demo.json",
    )
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment

    quiet_libraries()
    rates = options.rates
    if len(set(rates)) < 2 or options.seeds < 1:
        raise ConfigError("--rates must be at least two different rates, and --seeds at least 1")
    whole = f"{min(rates)}:{max(rates)}"
    rows = []
    correct: dict[tuple[str, float, int], Any] = {}
    for seed in range(options.seeds):
        for name in (whole, *map(str, rates)):
            folder = Path(options.runs) / f"{options.method}-{name.replace(':', '-')}-{seed}"
            print(f"seed {seed}, rate {name}", file=sys.stderr, flush=True)
            model, data, run = _trained(options, name, seed, folder)
            for rate in rates if name == whole else [float(name)]:
                kind = "elastic" if name == whole else "fixed"
                correct[kind, rate, seed] = _correct(model.set_rate(rate), data, run.batch_size)
    for rate in rates:
        elastic, fixed = ([correct[kind, rate, seed] for seed in range(options.seeds)] for kind in ("elastic", "fixed"))
        rows.append({"rate": rate, **_compared(elastic, fixed)})
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    here = environment()
    settings = {name: value for name, value in asdict(options).items() if name not in ("runs", "output")}
    write_json(options.output, {"options": settings, "rows": rows, "environment": here})
    print(f"written to {options.output} (percentage points, {options.seeds} seeds, 95 % interval of elastic - fixed)")
    return 0


def _trained(options: StudyOptions, rate: str, seed: int, folder: Path) -> tuple[Any, Any, RunOptions]:
    from pyra.tasks.evaluation import data_for, task_of_run
    from pyra.tasks.runs import load_run
    from pyra.tasks.training import train

    elastic = ":" in rate
    if not (folder / "result.json").is_file():
        train(
            RunOptions(
                backbone=options.backbone,
                checkpoint=options.checkpoint,
                image_size=options.image_size,
                task=options.task,
                data=options.data,
                method=options.method,
                rate=rate,
                elastic=elastic,
                distill=elastic and options.distill,
                rank=options.rank,
                targets=options.targets,
                dropout=0.0,
                drop_path=0.0,
                epochs=options.epochs,
                batch_size=options.batch_size,
                lr=options.lr,
                reactivation_lr=options.reactivation_lr,
                seed=seed,
                output=str(folder),
            )
        )
    model, run, labels = load_run(folder)
    return model, data_for(model, task_of_run(folder, run, labels), "test"), run


def _correct(model: Any, data: Any, batch_size: int) -> Any:
    """Return which test images are classified right, one number an image."""
    import torch
    from torch.utils.data import DataLoader

    found = []
    with torch.inference_mode():
        for batch in DataLoader(data, batch_size=4 * batch_size):
            found.append(model(batch["pixel_values"]).argmax(-1) == batch["labels"])
    return torch.cat(found).float().numpy()


def _compared(elastic: list[Any], fixed: list[Any]) -> dict[str, float]:
    """Means in percentage points, and the paired difference with its bootstrap interval over images and seeds."""
    import numpy as np

    ours, theirs = np.stack(elastic), np.stack(fixed)
    difference, random = ours - theirs, np.random.default_rng(0)
    seeds, images = difference.shape
    draws = [
        difference[random.integers(seeds, size=seeds)][:, random.integers(images, size=images)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        "elastic": 100 * float(ours.mean()),
        "fixed": 100 * float(theirs.mean()),
        "difference": 100 * float(difference.mean()),
        "low": 100 * float(low),
        "high": 100 * float(high),
        "spread of elastic": 100 * float(ours.mean(1).std(ddof=1)) if seeds > 1 else 0.0,
        "spread of fixed": 100 * float(theirs.mean(1).std(ddof=1)) if seeds > 1 else 0.0,
        "test images": images,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Schedules at equal MACs: the solver's shape, calibrated, searched; ``python -m pyra.scripts.study_schedules``.

Untrained merging of a frozen backbone, judged on test images by a linear probe that was fitted to unmerged training
features: its accuracy, how often its answer stays that of the unmerged model, and how far the features move.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse
from pyra.tasks.options import RunOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyra.tasks.data.images import ImageDataset
    from pyra.tasks.schedules.scores import Probe

MEASURES = ("accuracy", "agreement", "drift")


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    task: str | None = option(None, "a shipped task by name ('demo' unless --data is given)")
    data: str | None = option(None, "your data instead, as for pyra train")
    backbone: str = option("demo", "as for pyra train")
    checkpoint: str | None = option(None, "as for pyra train")
    image_size: int | None = option(None, "as for pyra train")
    rates: tuple[float, ...] = option((0.5, 0.7), "shares of the MACs to save")
    seeds: int = option(3, "draws of calibration images, and searches")
    images: int = option(16, "images of a calibration")
    trials: int = option(10, "schedules of a search, besides the solver's")
    limit: int | None = option(None, "use this many training and validation images only")
    test_limit: int = option(500, "test images")
    device: str = option("auto", "as for pyra train")
    output: str = option("results/schedules-demo.json", "file to write the rows to")


@dataclass(frozen=True)
class Subject:
    """A plain backbone, the splits of a task, and what is known of them without merging."""

    model: nn.Module
    training: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    probe: Probe
    features: Tensor

    def judged(self, schedule: list[int]) -> dict[str, float]:
        """Return :data:`MEASURES` of a schedule on the test images, the first two in percent."""
        import torch

        from pyra.backbones import wrap
        from pyra.config import PyraConfig
        from pyra.tasks.schedules.calibration import relative_change
        from pyra.tasks.schedules.costs import private_copy
        from pyra.tasks.schedules.scores import features_of

        merged = wrap(private_copy(self.model), PyraConfig(schedule=schedule, reactivation=False))
        found = features_of(merged, self.test, name="test images")
        answers, before = self.probe(found).argmax(1), self.probe(self.features).argmax(1)
        right = answers == torch.tensor(self.test.labels)
        return {
            "accuracy": 100 * float(right.double().mean()),
            "agreement": 100 * float((answers == before).double().mean()),
            "drift": relative_change(found, self.features),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table of means and spreads, and write all rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_schedules",
        description="Compare the solver's schedules with calibrated and searched ones at equal MACs.",
        example="python -m pyra.scripts.study_schedules --seeds 3 --output results/schedules-demo.json",
    )
    positive = {name: getattr(options, name) for name in ("seeds", "images", "trials", "test_limit")}
    wrong = [f"--{name.replace('_', '-')}" for name, value in positive.items() if value < 1]
    if wrong or not options.rates or not all(0 < rate < 1 for rate in options.rates):
        raise ConfigError(f"{wrong[0]} must be at least 1" if wrong else "--rates must be between 0 and 1")
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment
    from pyra.tasks.runs import resolve_device

    quiet_libraries()
    made_in = environment(str(resolve_device(options.device)))
    subject = _subject(options)
    plain = subject.judged([0] * len(subject.model.blocks))  # type: ignore[arg-type]
    rows = list(_rows(options, subject))
    summary = summarised(rows)
    print(tabulate(summary, headers="keys", floatfmt=".3f"))
    settings: dict[str, Any] = {name: value for name, value in asdict(options).items() if name != "output"}
    for name in ("data", "checkpoint"):  # the record names what was read, not where it lay
        settings[name] = settings[name] and Path(settings[name]).name
    sizes = {name: len(getattr(subject, name)) for name in ("training", "validation", "test")}
    record = {"options": settings, "images": sizes, "unmerged": plain, "summary": summary, "rows": rows}
    write_json(options.output, record | {"environment": made_in})
    print(f"unmerged: accuracy {plain['accuracy']:.1f}; written to {options.output}")
    return 0


def _subject(options: StudyOptions) -> Subject:
    import torch

    from pyra.tasks.evaluation import data_for
    from pyra.tasks.protocols.choosing import choosing_splits
    from pyra.tasks.runs import new_backbone, resolve_device, task_for
    from pyra.tasks.schedules.scores import Probe, features_of

    names = ("task", "data", "backbone", "checkpoint", "image_size")
    made = RunOptions(**{name: getattr(options, name) for name in names}, method="linear")
    task = task_for(made)
    model = new_backbone(made, num_classes=0).to(resolve_device(options.device)).eval()
    splits = choosing_splits(task)
    parts = {"train": splits.training, "validation": splits.validation, "test": task.splits["test"]}
    chosen = dataclasses.replace(task, splits=parts)
    training, validation = (data_for(model, chosen, name, limit=options.limit) for name in ("train", "validation"))
    test = data_for(model, chosen, "test", limit=options.test_limit)
    features = features_of(model, training, name="training images")
    probe = Probe.fitted(features, torch.tensor(training.labels), len(task.labels))
    return Subject(model, training, validation, test, probe, features_of(model, test, name="test images"))


def _rows(options: StudyOptions, subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield one row a schedule; a calibration serves all rates."""
    import random

    import torch

    from pyra.backbones import geometry
    from pyra.config import PyraConfig
    from pyra.cost import geometry_macs
    from pyra.schedule import solve_schedule
    from pyra.tasks.schedules.calibration import calibrate, distribute
    from pyra.tasks.schedules.costs import CountedCosts
    from pyra.tasks.schedules.scores import ProbeScore
    from pyra.tasks.schedules.search import search_schedule

    sizes, config = geometry(subject.model), PyraConfig(rate=0.5, reactivation=False)
    costs, plain = CountedCosts(sizes), geometry_macs(sizes)
    score = ProbeScore(subject.model, config, subject.probe, subject.validation)

    def row(how: str, rate: float, seed: int, schedule: list[int]) -> dict[str, Any]:
        print(f"{how}, rate {rate}, seed {seed}: {schedule}", file=sys.stderr, flush=True)
        real = 1 - geometry_macs(sizes, schedule) / plain
        return {"how": how, "rate": rate, "seed": seed, "real_rate": real, "schedule": schedule} | subject.judged(
            schedule
        )

    for rate in options.rates:
        yield row("solver", rate, 0, solve_schedule(sizes, rate=rate))
    like = next(subject.model.parameters())
    for seed in range(options.seeds):
        drawn = random.Random(seed).sample(range(len(subject.training)), min(options.images, len(subject.training)))
        images = torch.stack([subject.training[index]["pixel_values"] for index in drawn]).to(like.device)
        calibration = calibrate(subject.model, images, config)
        for rate in options.rates:
            yield row("calibrated", rate, seed, distribute(calibration, costs, plain * (1 - rate)))
        for rate in options.rates:
            with tempfile.TemporaryDirectory() as folder:
                found = search_schedule(
                    score,
                    costs,
                    plain * (1 - rate),
                    trials=options.trials,
                    storage=Path(folder) / "trials.jsonl",
                    seed=seed,
                    start=[solve_schedule(sizes, rate=rate)],
                )
            yield row("searched", rate, seed, found.best.schedule)


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds of each measure, for each rate and way."""
    found = []
    for rate, how in dict.fromkeys((row["rate"], row["how"]) for row in sorted(rows, key=lambda row: row["rate"])):
        group = [row for row in rows if (row["rate"], row["how"]) == (rate, how)]
        line: dict[str, Any] = {"rate": rate, "how": how, "seeds": len(group)}
        for name in MEASURES:
            values = [row[name] for row in group]
            line[name] = float(np.mean(values))
            line[f"{name} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())

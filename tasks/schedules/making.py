"""``pyra schedule``: from options to a schedule, what it rests on, and its record."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError, OutputError
from pyra.records import ABOVE_0, BELOW_1, SEED, bound_problems, option
from pyra.tasks.options import DEVICES, RunOptions
from pyra.tasks.schedules.record import ScheduleRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyra.config import PyraConfig
    from pyra.tasks.schedules.calibration import Calibration
    from pyra.tasks.schedules.costs import Costs, MeasuredCosts
    from pyra.tasks.schedules.latency import LatencyTarget, TimedSchedule
    from pyra.tasks.schedules.search import Searched

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(kw_only=True)
class ScheduleOptions:
    """Options of ``pyra schedule``."""

    backbone: str = option("demo", "timm name, folder of a timm model, or 'demo'")
    checkpoint: str | None = option(None, "weights from a .safetensors, .npz or .pth file instead of the hub's")
    pretrained: bool = option(True, "start from pretrained weights (a latency alone needs none, and loads none)")
    image_size: int | None = option(None, "image side in pixels; the backbone's own by default")
    run: str | None = option(None, "instead of --backbone: folder written by pyra train, with its adapter")
    rate: float | None = option(None, "share of the MACs to save, in [0, 1)")
    latency: str | None = option(None, "seconds of a forward of --batch-size images on this device: 5ms, 0.2s, 800us")
    speedup: float | None = option(None, "how many times faster than the plain model, measured on this device")
    calibrate: str | None = option(
        None, "distribute the merging by what it disturbs, on images of a folder or a task", metavar="FOLDER|TASK"
    )
    images: int = option(32, "images to calibrate on")
    search: bool = option(False, "search for the best score on the validation split of --task or --data, or of --run")
    trials: int = option(20, "schedules to try in a search; what was tried lies beside --output, and is gone on with")
    task: str | None = option(None, "a shipped task by name, to search with")
    data: str | None = option(None, "your data, to search with, as for pyra train")
    root: str | None = option(None, "folder with the data of shipped tasks that bring none (PYRA_DATA by default)")
    limit: int | None = option(None, "use this many images of each split only, to try things out")
    method: str = option("pyra", "tome merges plainly, pyra re-activates (which takes time)", choices=("tome", "pyra"))
    matching: str = option("bipartite", "how pairs are found", choices=("bipartite", "energy", "local", "prune"))
    batch_size: int = option(1, "images of a timed forward")
    rounds: int = option(9, "timed turns")
    seed: int = option(0, "seed of the draw of calibration images, and of a search")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("float32", "precision of the model", choices=("float32", "bfloat16", "float16"))
    output: str = option("schedule.json", "JSON file to write")
    overwrite: bool = option(False, "replace the file in --output")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        problems = []
        targets = [name for name in ("rate", "latency", "speedup") if getattr(self, name) is not None]
        if len(targets) != 1:
            problems.append("give exactly one of --rate, --latency and --speedup")
        if self.latency is not None:
            try:
                parse_seconds(self.latency)
            except ConfigError as error:
                problems.append(str(error))
        if self.speedup is not None and not 1 <= self.speedup < 1e6:
            problems.append(f"--speedup must be a number of at least 1, got {self.speedup}")
        if self.calibrate is not None and self.search:
            problems.append("give --calibrate or --search, not both")
        if self.task is not None and self.data is not None:
            problems.append("give --task or --data, not both")
        if not self.search and (self.task is not None or self.data is not None):
            problems.append("--task and --data go with --search")
        if self.search and self.run is None and self.task is None and self.data is None:
            problems.append("--search needs --task or --data (or --run, which has its own)")
        if self.run is not None:
            own = {"task": None, "data": None, "checkpoint": None, "image_size": None, "backbone": "demo"}
            given = [f"--{name.replace('_', '-')}" for name, value in own.items() if getattr(self, name) != value]
            if given:
                problems.append(f"a run has its own backbone and data: leave {', '.join(given)} out")
        if self.method == "pyra" and self.matching == "prune":
            problems.append("--matching prune drops tokens, which --method pyra cannot re-activate: give --method tome")
        problems += bound_problems(self, ABOVE_0, ("images", "trials", "batch_size", "rounds", "image_size", "limit"))
        problems += bound_problems(self, BELOW_1, ["rate"]) + bound_problems(self, SEED, ["seed"])
        if re.fullmatch(DEVICES, self.device) is None:
            problems.append(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")
        if Path(self.output).suffix.lower() != ".json":
            problems.append(f"--output must end in .json, got {self.output!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def how(self) -> str:
        """What the schedule comes from."""
        if self.search:
            return "searched"
        return "calibrated" if self.calibrate is not None else "rate" if self.rate is not None else "latency"

    def target(self) -> dict[str, float]:
        """Return what is asked for, in numbers."""
        if self.latency is not None:
            return {"seconds": parse_seconds(self.latency)}
        return {"rate": float(self.rate)} if self.rate is not None else {"speedup": float(self.speedup or 1)}

    def pyra_config(self) -> PyraConfig:
        """Return how tokens are merged; its rate is not read."""
        from pyra.config import PyraConfig

        return PyraConfig(rate=0.5, reactivation=self.method == "pyra", matching=self.matching)


def parse_seconds(text: str) -> float:
    """Return the seconds of ``5ms``, ``0.2s`` or ``800us``.

    Raises:
        ConfigError: for anything else.

    >>> parse_seconds("5ms")
    0.005
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)\s*", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--latency must be a time such as 5ms, 0.2s or 800us, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Made:
    """A schedule, and what was measured on the way; what does not apply is None."""

    record: ScheduleRecord
    timed: TimedSchedule | None
    calibration: Calibration | None
    searched: Searched | None
    notes: list[str]


def make_schedule(options: ScheduleOptions) -> Made:
    """Find a schedule as the options say, and write its record.

    Raises:
        ScheduleError: where merging cannot reach the target; the message names the best it can.
        OutputError: where the file exists and is not to be overwritten.
        PyraError: for whatever else is wrong with the model, the images or the data.
    """
    import torch

    from pyra.backbones import geometry
    from pyra.backbones.loading import preprocessing
    from pyra.cost import geometry_macs
    from pyra.tasks.results import environment
    from pyra.tasks.runs import DTYPES, resolve_device
    from pyra.tasks.schedules.costs import CountedCosts, measure_costs

    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise OutputError(f"{output} already exists: pass --overwrite to replace it, or choose another --output")
    if output.parent.exists() and not output.parent.is_dir():
        raise OutputError(f"{output.parent} is no folder: choose another --output")
    device = resolve_device(options.device)
    model, name = _model(options)
    model = model.to(device, DTYPES[options.dtype]).eval()
    side, sizes, config = preprocessing(model).image_size, geometry(model), _config(options, model)
    notes: list[str] = []
    calibration = _calibration(options, model, config) if options.calibrate is not None else None
    timed, searched = None, None
    costs: Costs
    if options.rate is not None:
        costs = counted = CountedCosts(sizes)
        schedule = _rate_solver(options.rate, calibration)(counted)
        budget = geometry_macs(sizes) * (1 - options.rate)
    else:
        from pyra.tasks.schedules.latency import LatencyTarget

        generator = torch.Generator().manual_seed(0)
        images = torch.randn(options.batch_size, 3, side, side, generator=generator).to(device, DTYPES[options.dtype])
        costs = measured = measure_costs(model, images, config, rounds=options.rounds)
        timed = _timed(options, model, images, LatencyTarget(**options.target()), config, calibration, measured)
        schedule, budget = timed.schedule, timed.chosen.predicted
    if options.search:
        searched, origin = _searched(options, model, config, costs, budget, schedule, output)
        notes.append(origin)
        if timed is not None:
            timed = _checked_again(timed, searched.best.schedule, model, images, config, options.rounds)
        schedule = searched.best.schedule
    values = asdict(options)
    for kept in ("checkpoint", "data", "calibrate", "run", "root"):  # what was read, not where it lay
        values[kept] = values[kept] and Path(values[kept]).name
    macs, plain = geometry_macs(sizes, schedule), geometry_macs(sizes)
    record = ScheduleRecord(
        schedule=schedule,
        how=options.how,
        backbone=name,
        image_size=side,
        target=options.target(),
        rate=1 - macs / plain,
        macs=macs,
        plain_macs=plain,
        predicted=_predicted(timed),
        measured=_measured(timed),
        layers=_layers(schedule, costs, calibration),
        details=_details(timed, calibration, searched),
        options={key: value for key, value in values.items() if key not in ("output", "overwrite")},
        environment=environment(str(device)),
    )
    record.save(output)
    return Made(record, timed, calibration, searched, notes)


def _model(options: ScheduleOptions) -> tuple[nn.Module, str]:
    import torch

    from pyra.tasks.runs import load_run, new_backbone

    if options.run is not None:
        model, trained_with, _ = load_run(options.run)
        return model, Path(trained_with.backbone).name
    about_weights = options.calibrate is not None or options.search
    made = RunOptions(
        backbone=options.backbone,
        checkpoint=options.checkpoint if about_weights else None,
        pretrained=options.pretrained and about_weights,
        image_size=options.image_size,
        method="linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_backbone(made, num_classes=0), Path(options.backbone).name


def _config(options: ScheduleOptions, model: nn.Module) -> PyraConfig:
    """Return how tokens are merged: as a run's adapter has it, else as the options say."""
    from pyra.backbones import wrapped_config

    return wrapped_config(model) or options.pyra_config()


def _calibration(options: ScheduleOptions, model: nn.Module, config: PyraConfig) -> Calibration:
    from pyra.tasks.schedules.calibration import calibrate
    from pyra.tasks.schedules.images import calibration_images

    images = calibration_images(str(options.calibrate), model, options.images, options.seed, options.root)
    like = next(model.parameters())
    return calibrate(model, images.to(like.device, like.dtype), config)


def _rate_solver(rate: float, calibration: Calibration | None) -> Callable[[Costs], list[int]]:
    from pyra.cost import geometry_macs
    from pyra.schedule import solve_schedule
    from pyra.tasks.schedules.calibration import distribute

    def solve(costs: Costs) -> list[int]:
        even = solve_schedule(costs.geometry, rate=rate)  # or the error that says how far merging can go
        if calibration is None:
            return even
        return distribute(calibration, costs, geometry_macs(costs.geometry) * (1 - rate))

    return solve


def _timed(
    options: ScheduleOptions,
    model: nn.Module,
    images: Tensor,
    target: LatencyTarget,
    config: PyraConfig,
    calibration: Calibration | None,
    costs: MeasuredCosts,
) -> TimedSchedule:
    from pyra.tasks.schedules.calibration import distribute
    from pyra.tasks.schedules.latency import latency_schedule, schedule_within

    def by_drift(costs: MeasuredCosts, budget: float) -> list[int]:
        assert calibration is not None
        return distribute(calibration, costs, budget)

    solve = schedule_within if calibration is None else by_drift
    return latency_schedule(model, images, target, config, solve=solve, costs=costs, rounds=options.rounds)


def _searched(
    options: ScheduleOptions,
    model: nn.Module,
    config: PyraConfig,
    costs: Costs,
    budget: float,
    start: list[int],
    output: Path,
) -> tuple[Searched, str]:
    from pyra.tasks.evaluation import data_for
    from pyra.tasks.protocols.choosing import choosing_splits
    from pyra.tasks.runs import load_run, task_for, task_of_run
    from pyra.tasks.schedules.scores import Probe, ProbeScore, RunScore, features_of, trials_file
    from pyra.tasks.schedules.search import Score, search_schedule

    if options.run is not None:
        _, trained_with, labels = load_run(options.run)
        task = task_of_run(options.run, trained_with, labels)
    else:
        wanted = RunOptions(task=options.task, data=options.data, root=options.root, method="linear")
        task = task_for(wanted)
    splits = choosing_splits(task)
    chosen = dataclasses.replace(task, splits={"train": splits.training, "validation": splits.validation})
    validation = data_for(model, chosen, "validation", limit=options.limit)
    origin = f"scored on {len(validation)} images, {splits.origin}; the test split was not looked at"
    score: Score
    if options.run is not None:
        score = RunScore(model, config, validation, task.metric)
        origin += "; the run may have been trained on them"
    else:
        training = data_for(model, chosen, "train", limit=options.limit)
        features = features_of(model, training, name="features of training images")
        import torch

        probe = Probe.fitted(features, torch.tensor(training.labels), len(task.labels))
        score = ProbeScore(model, config, probe, validation, task.metric)
    watched = ("backbone", "checkpoint", "image_size", "run", "task", "data", "limit", "method", "matching", "dtype")
    settings = {name: getattr(options, name) for name in watched} | {"target": options.target()}
    searched = search_schedule(
        score,
        costs,
        budget,
        trials=options.trials,
        storage=trials_file(output),
        seed=options.seed,
        start=[start],
        higher_is_better=task.higher_is_better,
        settings=settings,
    )
    return searched, origin


def _checked_again(
    timed: TimedSchedule, schedule: list[int], model: nn.Module, images: Tensor, config: PyraConfig, rounds: int
) -> TimedSchedule:
    from pyra.tasks.schedules.latency import check

    found = check(model, images, schedule, config, timed.costs, rounds)
    return dataclasses.replace(timed, checks=[*timed.checks, found], chosen=found)


def _predicted(timed: TimedSchedule | None) -> dict[str, Any] | None:
    if timed is None:
        return None
    return {"seconds": timed.chosen.predicted, "speedup": timed.chosen.predicted_speedup}


def _measured(timed: TimedSchedule | None) -> dict[str, Any] | None:
    if timed is None:
        return None
    chosen = timed.chosen
    return {"seconds": chosen.measured, "speedup": chosen.speedup, "plain_seconds": chosen.plain, "met": timed.met}


def _layers(schedule: list[int], costs: Costs, calibration: Calibration | None) -> list[dict[str, float]]:
    from pyra.cost import token_counts
    from pyra.tasks.schedules.calibration import POWER

    counts = token_counts(costs.geometry, schedule)
    rows: list[dict[str, float]] = []
    for layer, removed in enumerate(schedule):
        row: dict[str, float] = {"layer": layer, "tokens": counts[layer], "removed": removed}
        row["cost"] = float(costs.of_layer(layer, counts[layer])[removed])
        if calibration is not None:
            row["drift"] = float(calibration.of_layer(layer, counts[layer])[removed]) ** (1 / POWER)
        rows.append(row)
    return rows


def _details(timed: TimedSchedule | None, calibration: Calibration | None, searched: Searched | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if timed is not None:
        found["checks"] = timed.checks
        found["costs"] = {"fixed": timed.costs.fixed, "scale": timed.costs.scale, "layers": list(timed.costs.times)}
        found["batch_size"] = timed.costs.batch_size
    if calibration is not None:
        found["calibration"] = calibration
    if searched is not None:
        found["best"], found["trials"] = searched.best, searched.trials
    return found

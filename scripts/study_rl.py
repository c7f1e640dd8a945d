"""FiberPO beside GRPO and GSPO on a tiny decoder's arithmetic; ``python -m pyra.scripts.study_rl``.

The decoder first learns sums badly, from the right answers. Each way then goes on from the same weights with equal
rollouts and several updates on each. Rows are written as they are made: the same command goes on where it was
interrupted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError
from pyra.records import option, record_problems
from pyra.scripts.cli import parse
from pyra.scripts.studies import begun_record, several_ways, told

if TYPE_CHECKING:
    from pyra.tasks.posttraining.rl_options import RlOptions

_WAYS = "algorithm: fiberpo; algorithm: grpo; algorithm: gspo; algorithm: gspo, clip: 0.1; algorithm: grpo, updates: 1"


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    ways: str = option(_WAYS, "options of pyra rl, as YAML without braces; several with ; between them")
    seeds: int = option(3, "trainings of each way")
    first_seed: int = option(0, "the first of them")
    supervised: int = option(450, "steps on right answers beforehand")
    rollouts: int = option(30, "rollouts of each training")
    updates: int = option(4, "updates on each rollout, where a way says nothing else")
    batch_size: int = option(64, "answers of a rollout")
    group: int = option(8, "answers to each prompt")
    lr: float = option(2e-4, "peak learning rate, of all weights")
    problems: int = option(3000, "training problems")
    test_problems: int = option(300, "problems that are held out")
    digits: int = option(2, "digits of each number, at most")
    operators: str = option("+", "operators of the problems")
    output: str = option("rl-arithmetic.json", "file for the rows; the picture is put next to it")


def main(argv: Sequence[str] | None = None) -> int:
    """Train every way, print a table, write the rows and the picture."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_rl",
        description="Compare FiberPO with GRPO and GSPO: equal rollouts, several updates on each, from equal weights.",
        example="python -m pyra.scripts.study_rl --output results/rl-arithmetic.json",
    )
    if min(options.seeds, options.supervised, options.rollouts) < 1:
        raise ConfigError("--seeds, --supervised and --rollouts must be at least 1")
    ways = several_ways("--ways", options.ways, "algorithm: fiberpo, fiber_eps: 0.1")
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: _run(name, way, options, folder) for name, way in ways.items()}
        return _study(options, runs, Path(folder))


def _study(options: StudyOptions, runs: dict[str, RlOptions], folder: Path) -> int:
    from dataclasses import replace

    from pyra.files import write_json
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.posttraining.rl_study import make_pupil, study_panels, study_table, teach
    from pyra.tasks.reports.curves import draw_curves
    from pyra.tasks.results import environment

    record = begun_record(options.output, told(options, ("output", "ways", "seeds", "first_seed")))
    losses = make_pupil(folder, next(iter(runs.values())), options.supervised)
    print(f"supervised: loss {losses[-1]:.3f} after {len(losses)} steps", file=sys.stderr)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, run in runs.items():
            if any((row["name"], row["seed"]) == (name, seed) for row in record["rows"]):
                continue
            record["rows"].append(teach(replace(run, seed=seed), name, options.rollouts))
            record["environment"] = environment("cpu")
            write_json(options.output, record)
    rows = [row for row in record["rows"] if row["name"] in runs]
    picture = Path(options.output).with_suffix(".png")
    draw_curves(picture, study_panels(rows))
    print(study_table(rows))
    print(f"written to {options.output} and {picture} (accuracies in %, of held-out problems, answered greedily)")
    return 0


def _run(name: str, way: dict[str, Any], options: StudyOptions, folder: str) -> RlOptions:
    """Return the run of one way.

    Raises:
        ConfigError: for what are no options of a run.
    """
    from pyra.tasks.posttraining.rl_options import RlOptions

    shared = ("updates", "batch_size", "group", "lr", "problems", "test_problems", "digits", "operators")
    values = {key: getattr(options, key) for key in shared}
    values |= {"backbone": folder, "task": "arithmetic", "method": "full", "device": "cpu", "max_new_tokens": 8, **way}
    if problems := record_problems(RlOptions, values):
        raise ConfigError(f"--ways: {name!r}: {'; '.join(problems)}")
    return RlOptions(**values)


if __name__ == "__main__":
    sys.exit(main())

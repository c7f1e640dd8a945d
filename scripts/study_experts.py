"""Compare rankings of experts, controls and fewer active experts; ``python -m pyra.scripts.study_experts``.

No model is written: experts that do not stay are closed in the router, which gives the same outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyra.tasks.language.compression import Variant
    from pyra.tasks.language.studying import ExpertStudy


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("", "folder of a JoyAI checkpoint, as for pyra compress-experts")
    task: str = option("gsm8k", "as for pyra compress-experts")
    root: str | None = option(None, "as for pyra compress-experts")
    data: str | None = option(None, "as for pyra compress-experts")
    other: str | None = option(None, "another task, below the same --root, whose experts are kept as a control")
    keep: tuple[float, ...] = option((0.75, 0.5, 0.25), "shares or numbers of experts that stay")
    active: tuple[int, ...] = option((), "experts a token, of the whole model")
    draws: int = option(3, "random choices of experts of each size, as a control")
    limit: int = option(512, "training examples that experts are scored on, and test examples (a fixed draw)")
    batch_size: int = option(8, "examples a forward")
    device: str = option("auto", "auto, cpu or cuda")
    output: str = option("experts.json", "file for the rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Score, compare, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_experts",
        description="Compare rankings of experts, controls and fewer active experts on the answers of a task.",
        example=(
            "python -m pyra.scripts.study_experts --backbone tiny-joyai --root data/ --other sst2 --active 3,2,1 "
            "--output results/experts-tiny-joyai.json"
        ),
    )
    if options.draws < 0 or options.limit < 1 or not options.keep:
        raise ConfigError("--draws must be 0 at least, --limit 1, and --keep a list")
    from pyra.files import read_json, write_json
    from pyra.tasks.language.studying import ExpertStudy
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports.experts import experts_table
    from pyra.tasks.results import environment

    quiet_libraries()
    study = ExpertStudy.of(
        options.backbone, options.task, options.root, options.data, options.limit, options.batch_size, options.device
    )
    rows = list(_rows(options, study))
    print(experts_table(rows))
    settings = {name: value for name, value in asdict(options).items() if name not in ("root", "data", "output")}
    settings["backbone"] = Path(options.backbone).name
    made = Path(options.backbone).expanduser() / "training.json"
    training = {} if not made.is_file() else {k: v for k, v in read_json(made).items() if k in ("options", "test")}
    write_json(
        options.output,
        {
            "options": settings,
            "backbone_training": training,
            "calibration": study.calibration,
            "test": study.test,
            "rows": rows,
            "environment": environment(study.losses.model.device.type),
        },
    )
    print(f"written to {options.output} (nats a token of the answers; differences in pairs with their standard error)")
    return 0


def _rows(options: StudyOptions, study: ExpertStudy) -> Iterator[Variant]:
    yield study.row("original")
    for number in options.active:
        yield study.row(f"{number} active", active=number)
    other = None if options.other is None else study.scored_on(options.other)
    for share in options.keep:
        number = study.number(share)
        for method in ("reap", "frequency"):
            yield study.row(method, study.best(number, method))
        if other is not None:
            yield study.row(f"reap on {options.other}", study.best(number, "reap", other))
        yield study.row("reap, lowest", study.worst(number))
        yield study.row("first", study.first(number))
        for draw in range(options.draws):
            yield study.row(f"random {draw}", study.drawn(number, draw))


if __name__ == "__main__":
    sys.exit(main())

"""Compare rounding experts after training with training them rounded; ``python -m pyra.scripts.study_qat``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("", "folder of a JoyAI checkpoint in float, as for pyra compress-experts")
    task: str = option("gsm8k", "as for pyra compress-experts")
    root: str | None = option(None, "as for pyra compress-experts")
    data: str | None = option(None, "as for pyra compress-experts")
    rounding: tuple[str, ...] = option(
        ("4:64", "4:32", "3:64", "2:64"), "bits and group sizes that the model is rounded to as it is"
    )
    trained: tuple[str, ...] = option(("4:64", "2:64"), "bits and group sizes that it is trained with")
    seeds: int = option(3, "orders of the texts")
    steps: int = option(100, "steps of further training, of the control and of each rounded model")
    train_batch_size: int = option(16, "texts a step")
    length: int = option(256, "tokens of a text in training")
    lr: float = option(1e-3, "peak learning rate, one cosine over the steps")
    limit: int = option(200, "test examples (a fixed draw)")
    batch_size: int = option(8, "examples a measured forward")
    output: str = option("qat.json", "file for the rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Round, train, compare, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_qat",
        description="Compare experts that are rounded after training with experts that train rounded, on answers.",
        example=(
            "python -m pyra.scripts.study_qat --backbone tiny-joyai --root data/ --output results/qat-tiny-joyai.json"
        ),
    )
    from tqdm import tqdm

    from pyra.experts import QuantisingConfig
    from pyra.files import read_json, write_json
    from pyra.tasks.language.rounding_study import RoundingStudy
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports.rounding import rounding_table
    from pyra.tasks.results import environment

    if options.seeds < 0 or options.limit < 1:
        raise ConfigError("--seeds must be 0 at least, and --limit 1")
    ways = {name: [QuantisingConfig(*_pair(one)) for one in getattr(options, name)] for name in ("rounding", "trained")}
    quiet_libraries()
    recipe = {"batch_size": options.train_batch_size} | {n: getattr(options, n) for n in ("steps", "length", "lr")}
    study = RoundingStudy.of(
        options.backbone, options.task, options.root, options.data, options.limit, options.batch_size, recipe=recipe
    )
    with tqdm(total=1 + len(ways["rounding"]) + options.seeds * (1 + 2 * len(ways["trained"])), disable=None) as bar:
        study.tell = bar.set_description
        rows = []
        for row in study.table(ways["rounding"], ways["trained"], options.seeds):
            rows.append(row)
            bar.update()
    print(rounding_table(rows))
    settings = {name: value for name, value in asdict(options).items() if name not in ("root", "data", "output")}
    settings["backbone"] = Path(options.backbone).name
    made = Path(options.backbone).expanduser() / "training.json"
    training = {} if not made.is_file() else {k: v for k, v in read_json(made).items() if k in ("options", "test")}
    told = {"options": settings, "backbone_training": training, "test": study.told, "rows": rows}
    write_json(options.output, {**told, "environment": environment("cpu")})
    print(f"written to {options.output} (nats a token of the answers; differences in pairs with their standard error)")
    return 0


def _pair(text: str) -> tuple[int, int]:
    try:
        bits, group = text.split(":")
        return int(bits), int(group)
    except ValueError:
        raise ConfigError(f"bits and a group size such as 4:64 are asked for, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())

"""``pyra benchmark``: speed and memory against the unwrapped model, each beside its goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pyra.errors import ConfigError
from pyra.scripts.cli import parse
from pyra.tasks.options import option


@dataclass(kw_only=True)
class BenchmarkOptions:
    """Options of ``pyra benchmark``."""

    backbone: str = option("vit_base_patch16_224", "timm name; other models than the paper's get its shape of schedule")
    image_size: int | None = option(None, "image side in pixels; the model's own by default")
    batch_size: int = option(16, "images a forward")
    train_batch_size: int = option(32, "images a training step")
    rounds: int = option(5, "timed forwards of each model; the median counts")
    train_rounds: int = option(3, "timed training steps of each model")
    threads: int | None = option(None, "CPU threads; all by default")
    training: bool = option(True, "measure training as well as inference")
    compile: bool = option(False, "measure compiled models and the time to compile them, too (needs a C++ compiler)")
    output: str = option("benchmark.json", "file to write the rows to")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table and write the rows."""
    options = parse(
        BenchmarkOptions,
        argv,
        prog="pyra benchmark",
        description="Measure speed and memory against the unwrapped model in one run (CPU, fp32).",
        example="pyra benchmark --backbone vit_base_patch16_224 --batch-size 16",
    )
    counts = ("batch_size", "train_batch_size", "rounds", "train_rounds", "threads")
    wrong = [name for name in counts if (value := getattr(options, name)) is not None and value < 1]
    if wrong:
        raise ConfigError("; ".join(f"--{name.replace('_', '-')} must be at least 1" for name in wrong))
    import torch
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.benchmark import Subject, compile_rows, inference_rows, training_rows
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment

    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject = Subject(options.backbone, options.image_size)
    rows = inference_rows(subject, options.batch_size, options.rounds)
    if options.compile:
        rows += inference_rows(subject, options.batch_size, options.rounds, compiled=True)
        rows += compile_rows(subject, options.batch_size)
    if options.training:
        rows += training_rows(subject, options.train_batch_size, options.train_rounds)
    table = [
        (row.name, f"{row.value:.2f} x", f"{row.goal:.2f} x", "yes" if row.reached else "NO", row.detail)
        for row in rows
    ]
    print(tabulate(table, headers=("measured", "ratio", "goal", "reached", "detail")))
    write_json(
        options.output,
        {"options": asdict(options), "environment": environment(), "rows": [asdict(row) for row in rows]},
    )
    return 0

"""Adapters trained on whole, merged, dropped and truncated prompts; ``python -m pyra.scripts.study_prompt_training``.

Each way is trained on the same examples with the same seeds. Rows are written as they are made: the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError
from pyra.records import option, record_problems
from pyra.scripts.cli import parse
from pyra.scripts.studies import begun_record, several_ways, told

if TYPE_CHECKING:
    from pyra.tasks.language.options import LanguageOptions

_WAYS = (
    "method: lora; method: tome, rate: 0.5, rule: drop; method: tome, rate: 0.5; method: pyra, rate: 0.5; "
    "method: tome, rate: 0.5, rule: truncate"
)


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("", "folder of a decoder, or a name on the hub")
    task: str = option("copy", "a language task that is answered by prompt")
    root: str | None = option(None, "folder with a folder of each task's files")
    data: str | None = option(None, "folder with the task's files themselves")
    ways: str = option(_WAYS, "options of pyra train, as YAML without braces; several with ; between them")
    seeds: int = option(1, "trainings of each way")
    train: int = option(400, "training examples (a fixed draw)")
    test: int = option(100, "test examples (a fixed draw)")
    epochs: float = option(1.0, "passes over the training examples")
    batch_size: int = option(4, "examples a step, and a scored forward")
    lr: float = option(1e-3, "peak learning rate")
    targets: str = option("q_proj,k_proj,v_proj,o_proj", "modules that LoRA adapts")
    max_new_tokens: int = option(128, "tokens that are generated at most, for each answer")
    dtype: str = option("float32", "precision of the forward", choices=("float32", "bfloat16", "float16"))
    device: str = option("auto", "auto, cpu or cuda")
    rounds: int = option(5, "timed prefills of each way; 0 leaves speed out")
    output: str = option("prompt-training.json", "file for the rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score every way, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_prompt_training",
        description="Compare adapters that are trained on whole, merged, dropped and truncated prompts.",
        example=(
            "python -m pyra.scripts.study_prompt_training --backbone models/smollm2 --task copy --data data/gsm8k "
            "--train 400 --test 100 --output results/prompt-training.json"
        ),
    )
    if min(options.seeds, options.test) < 1 or options.rounds < 0:
        raise ConfigError("--seeds and --test must be at least 1, --rounds 0")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()  # before anything else loads them
    ways = several_ways("--ways", options.ways, "method: pyra, rate: 0.5")
    runs = {name: _run(name, way, options) for name, way in ways.items()}
    from dataclasses import replace

    from pyra.files import write_json
    from pyra.tasks.language.prompt_training import pairs_table, prefill_rows, train_and_score, training_table
    from pyra.tasks.results import environment
    from pyra.tasks.runs import resolve_device

    left_out = ("root", "data", "output", "ways", "seeds", "rounds", "device")
    record = begun_record(options.output, told(options, left_out), prefill={})
    for seed in range(options.seeds):
        for name, run in runs.items():
            if any((row["name"], row["seed"]) == (name, seed) for row in record["rows"]):
                continue
            record["rows"].append(train_and_score(replace(run, seed=seed), options.test, name))
            record["environment"] = environment(resolve_device(options.device).type)
            write_json(options.output, record)
    if options.rounds:
        record["prefill"] = prefill_rows(runs, options.test, options.rounds)
        write_json(options.output, record)
    rows = [row for row in record["rows"] if row["name"] in runs]
    print(training_table(rows, record["prefill"]))
    print(pairs_table(rows))
    print(f"written to {options.output} (nats a token; differences in pairs, with their standard error)")
    return 0


def _run(name: str, way: dict[str, Any], options: StudyOptions) -> LanguageOptions:
    """Return the run of one way.

    Raises:
        ConfigError: for what are no options of a run.
    """
    from pyra.tasks.language.options import LanguageOptions

    shared = ("backbone", "task", "root", "data", "epochs", "batch_size", "lr", "targets", "max_new_tokens", "dtype",
              "device")  # fmt: skip
    values = {"dropout": 0.0, "limit": options.train, **{key: getattr(options, key) for key in shared}, **way}
    if problems := record_problems(LanguageOptions, values):
        raise ConfigError(f"--ways: {name!r}: {'; '.join(problems)}")
    return LanguageOptions(**values)


if __name__ == "__main__":
    sys.exit(main())

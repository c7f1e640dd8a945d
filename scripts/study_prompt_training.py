"""Adapters trained on whole, merged, dropped and truncated prompts; ``python -m pyra.scripts.study_prompt_training``.

Each way is trained on the same examples with the same seeds. Rows are written as they are made: the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pyra.errors import ConfigError
from pyra.records import option, record_problems
from pyra.scripts.cli import parse

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
    runs = {text.strip(): _run(text, options) for text in options.ways.split(";") if text.strip()}
    if not runs:
        raise ConfigError("--ways is empty")
    from dataclasses import replace

    from pyra.files import write_json
    from pyra.tasks.language.prompt_training import prefill_rows, train_and_score, training_table
    from pyra.tasks.results import environment
    from pyra.tasks.runs import resolve_device

    record = _begun(options)
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
    print(training_table([row for row in record["rows"] if row["name"] in runs], record["prefill"]))
    print(f"written to {options.output} (nats a token; differences in pairs, with their standard error)")
    return 0


def _run(text: str, options: StudyOptions) -> LanguageOptions:
    """Read one way.

    Raises:
        ConfigError: for what is no YAML, or no options of a run.
    """
    from pyra.tasks.language.options import LanguageOptions

    shared = ("backbone", "task", "root", "data", "epochs", "batch_size", "lr", "targets", "max_new_tokens", "dtype",
              "device")  # fmt: skip
    try:
        way: Any = yaml.safe_load(f"{{{text}}}")
    except yaml.YAMLError:
        raise ConfigError(f"--ways: {text.strip()!r} is no YAML such as 'method: pyra, rate: 0.5'") from None
    values = {"dropout": 0.0, "limit": options.train, **{name: getattr(options, name) for name in shared}, **way}
    if problems := record_problems(LanguageOptions, values):
        raise ConfigError(f"--ways: {text.strip()!r}: {'; '.join(problems)}")
    return LanguageOptions(**values)


def _begun(options: StudyOptions) -> dict[str, Any]:
    """Return the record that the output file holds already, if it is of the same options, or a new one.

    Raises:
        ConfigError: where the file holds something else.
    """
    from pyra.files import read_json

    left_out = ("root", "data", "output", "ways", "seeds", "rounds", "device")
    told = {name: value for name, value in asdict(options).items() if name not in left_out}
    told["backbone"] = Path(options.backbone).name
    if not Path(options.output).exists():
        return {"options": told, "rows": [], "prefill": {}}
    try:
        found = read_json(options.output)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("options") != told or not isinstance(found.get("rows"), list):
        raise ConfigError(f"--output {options.output} holds something else: give another file")
    return found


if __name__ == "__main__":
    sys.exit(main())

"""``pyra evaluate``: score and time a saved run, or a language model on a task's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class EvaluateOptions:
    """Options of ``pyra evaluate``."""

    run: str = option("", "folder written by pyra train, sft, dpo, rl or compress-experts")
    split: str = option("test", "split to score")
    rate: float | None = option(
        None, "share of the MACs to save; the run's own by default, any of its range if elastic"
    )
    batch_size: int | None = option(None, "images or examples a forward; the run's own by default")
    device: str = option("auto", "auto, cpu or cuda")
    skip_broken: bool = option(False, "leave unreadable images out instead of stopping")
    backbone: str | None = option(None, "language: score this model without a run, by the prompts of --task")
    task: str | None = option(
        None,
        "language, with --backbone or after sft, dpo, rl (or compress-experts, for another): the task, or a card file "
        "of yours",
    )
    root: str | None = option(
        None, "language, with --backbone: folder with a folder of each task's files (PYRA_DATA by default)"
    )
    data: str | None = option(
        None, "language, with --backbone: folder with the task's files themselves; without --task it tells the task"
    )
    answer: str | None = option(
        None,
        "language: scoring (label words after the prompt) or generation",
        choices=("head", "scoring", "generation"),
    )
    limit: int | None = option(None, "language: use this many examples only (a fixed draw)")
    max_length: int | None = option(None, "language: tokens that are read")
    max_new_tokens: int | None = option(None, "language: tokens that are generated at most, for each answer")
    num_fewshot: int | None = option(None, "language: answered training examples before each prompt")
    lm_eval: list[str] | None = option(  # noqa: RUF009 - a dataclass field
        None, "language: tasks of lm-evaluation-harness, such as gsm8k,hellaswag, instead of the run's own"
    )
    lm_eval_tasks: str | None = option(None, "language, with --lm-eval: folder with task files of your own")
    trust_task_code: bool = option(False, "language, with --lm-eval-tasks: run the Python code that task files name")
    chat: bool | None = option(None, "language: prompts through the tokenizer's chat template")
    thinking: str | None = option(
        None,
        "language, with --chat: tell the template to think or not (auto: as it does)",
        choices=("on", "off", "auto"),
    )
    dtype: str | None = option(None, "language: float32, bfloat16 or float16")
    output: str | None = option(None, "language, with --backbone: folder for the result")
    overwrite: bool = option(False, "language: replace the result in --output")


_OF_IMAGES = ("rate", "skip_broken")
_OF_BOTH = ("run", "split", "batch_size", "device")
_OF_BACKBONES = ("task", "root", "data", "output", "overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print a table and write the result into the run."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="pyra evaluate",
        description=(
            "Score a saved run as it is deployed (adapter folded, tokens merged) and time it; or a language model "
            "without a run."
        ),
        example=(
            "pyra evaluate runs/a\n  pyra evaluate runs/elastic --rate 0.5\n"
            "  pyra evaluate --backbone models/smollm2 --task gsm8k --root data/ --limit 50\n"
            "  pyra evaluate runs/g --lm-eval mine --lm-eval-tasks tasks/ --num-fewshot 2"
        ),
        positional="run",
    )
    if options.run and options.backbone is not None:
        raise ConfigError("give RUN or --backbone, not both")
    if options.lm_eval is None:
        _refuse(options, ("lm_eval_tasks", "trust_task_code"), "goes with --lm-eval")
    if options.backbone is not None:
        return _backbone(options) if options.lm_eval is None else _harness(options)
    if not options.run:
        raise ConfigError("RUN is missing: give the folder of a run (see 'pyra evaluate --help')")
    from pyra.tasks.language.compression import is_compression

    if is_compression(options.run) and options.lm_eval is None:
        return _compression(options)
    from pyra.tasks.posttraining.runs import run_kind

    if run_kind(options.run) is not None:
        return _posttrained(options)
    _refuse(options, _OF_BACKBONES, "goes with --backbone: a run knows its own")
    if options.lm_eval is not None:
        return _harness(options)
    from pyra.tasks.language.runs import is_language_run

    return _language_run(options) if is_language_run(options.run) else _image_run(options)


def _image_run(options: EvaluateOptions) -> int:
    folder = Path(options.run).expanduser()
    if (folder / "config.json").is_file() and not (folder / "options.json").is_file():
        raise ConfigError(f"{options.run} is a model, not a run: pyra evaluate --backbone {options.run} --task NAME")
    known = (*_OF_IMAGES, *_OF_BOTH)
    _refuse(options, [f.name for f in fields(options) if f.name not in known], f"is for language: {options.run} is not")
    from pyra.tasks.evaluation import caution, evaluate_run
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table
    from pyra.tasks.results import evaluation_file

    quiet_libraries()
    result = evaluate_run(
        options.run,
        split=options.split,
        batch_size=options.batch_size,
        device=options.device,
        skip_broken=options.skip_broken,
        rate=options.rate,
    )
    print(results_table([result]))
    print(f"images/s in batches of {result.throughput_batch_size}; speed-up over the same model without merging")
    if result.skipped_images:
        print(f"unreadable images left out: {result.skipped_images}")
    if (text := caution(result)) is not None:
        print(text)
    print(f"written to {Path(options.run) / evaluation_file(options.split, options.rate)}")
    return 0


def _language_run(options: EvaluateOptions) -> int:
    from pyra.tasks.language.evaluation import Evaluation, evaluate_language_run
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    _refuse_of_images(options)
    quiet_libraries()
    result, file, notes = evaluate_language_run(options.run, Evaluation(**_asked(options)))
    print(results_table([result]))
    for note in notes:
        print(note)
    print(f"written to {file}")
    return 0


def _compression(options: EvaluateOptions) -> int:
    """Score what pyra compress-experts wrote."""
    from pyra.tasks.language.compressed import evaluate_compression
    from pyra.tasks.language.evaluation import Evaluation
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    _refuse_of_images(options)
    _refuse(options, ("output", "overwrite"), f"goes with --backbone: the row is written into {options.run}")
    if options.root is not None and options.data is not None:
        raise ConfigError("give --root or --data, not both")
    quiet_libraries()
    result, file, notes = evaluate_compression(
        options.run, Evaluation(**_asked(options)), task=options.task, root=options.root, data=options.data
    )
    print(results_table([result]))
    for note in notes:
        print(note)
    print(f"written to {file}; in tables: pyra results {options.run} --evaluations")
    return 0


def _posttrained(options: EvaluateOptions) -> int:
    """Ask what pyra sft, dpo or rl trained."""
    _refuse_of_images(options)
    _refuse(options, ("lm_eval",), "asks runs of pyra train: pyra export RUN --format engine writes a model for it")
    _refuse(options, ("output", "overwrite"), f"goes with --backbone: the row is written into {options.run}")
    from pyra.tasks.language.evaluation import Evaluation
    from pyra.tasks.posttraining.evaluating import evaluate_posttrained
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    if options.root is not None and options.data is not None:
        raise ConfigError("give --root or --data, not both")
    quiet_libraries()
    result, file, notes = evaluate_posttrained(
        options.run, options.task, Evaluation(**_asked(options)), root=options.root, data=options.data
    )
    print(results_table([result]))
    for note in notes:
        print(note)
    print(f"written to {file}; in tables: pyra results {options.run} --evaluations")
    return 0


def _backbone(options: EvaluateOptions) -> int:
    from pyra.tasks.language.evaluation import Evaluation, evaluate_backbone
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    _refuse_of_images(options)
    from pyra.tasks.language.inferring import infer_task

    if options.root is not None and options.data is not None:
        raise ConfigError("give --root or --data, not both")
    task = options.task or infer_task(options.data, options.backbone)
    if task is None:
        raise ConfigError("--backbone needs --task: a language task (pyra tasks ls)")
    quiet_libraries()
    result, notes = evaluate_backbone(
        str(options.backbone),
        task,
        Evaluation(**_asked(options)),
        root=options.root,
        data=options.data,
        output=options.output,
        overwrite=options.overwrite,
    )
    print(results_table([result]))
    for note in notes:
        print(note)
    if options.output is not None:
        print(f"written to {options.output}")
    return 0


def _harness(options: EvaluateOptions) -> int:
    """Ask lm-evaluation-harness about a run or a backbone."""
    _refuse_of_images(options)
    _refuse(
        options,
        ("task", "root", "data", "answer", "max_new_tokens", "split", "thinking"),
        "is not for --lm-eval: its tasks say it",
    )
    from pyra.tasks.language.evaluation import Evaluation
    from pyra.tasks.language.harness import OWN, Harness, harness_on_backbone, harness_on_run
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    asked = Harness(
        tasks=options.lm_eval or [],
        folder=options.lm_eval_tasks,
        trust=options.trust_task_code,
        num_fewshot=options.num_fewshot,
        how=Evaluation(**{**_asked(options), "num_fewshot": 0}),
    )
    if options.backbone is None:
        where: str | None = options.run
        outcome = harness_on_run(options.run, asked)
    else:
        where = options.output
        outcome = harness_on_backbone(options.backbone, asked, output=where, overwrite=options.overwrite)
    print(outcome.table())
    if where is not None:
        print(f"written to {Path(where) / OWN}; in tables: pyra results {where} --evaluations")
    return 0


def _asked(options: EvaluateOptions) -> dict[str, Any]:
    names = ("split", "answer", "batch_size", "limit", "max_length", "max_new_tokens", "chat", "thinking", "device",
             "dtype")  # fmt: skip
    return {**{name: getattr(options, name) for name in names}, "num_fewshot": options.num_fewshot or 0}


def _refuse_of_images(options: EvaluateOptions) -> None:
    if options.rate is not None:
        raise ConfigError("--rate is for runs on images: a decoder answers at the rate that it was trained with")
    _refuse(options, _OF_IMAGES, "is for runs on images")


def _refuse(options: EvaluateOptions, names: Sequence[str], why: str) -> None:
    """Raise :class:`ConfigError` where one of these options was given."""
    defaults = EvaluateOptions()
    given = [name for name in names if getattr(options, name) != getattr(defaults, name)]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} {why}")

"""``pyra train``: adapt a backbone to a task and save the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pyra.errors import ConfigError
from pyra.scripts.cli import listed, parse, peek

if TYPE_CHECKING:
    from pyra.tasks.language.series import SeriesOptions
    from pyra.tasks.protocols.options import ExperimentOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result as a table; a language task has options of its own."""
    argv = _with_task(sys.argv[1:] if argv is None else argv)
    from pyra.tasks.language.cards import is_text_task
    from pyra.tasks.language.inferring import reads_text_alone

    task = peek(argv, "task")
    about_texts = is_text_task(task) or (task is None and reads_text_alone(peek(argv, "backbone")))
    options = _language_options(argv) if about_texts else _options(argv)
    from pyra.tasks.fitting import processes
    from pyra.tasks.language.series import SeriesOptions
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    if processes.launched_alone():
        print(
            "note: the launcher started one process; for several on the CPU: "
            "torchrun --nproc_per_node 2 -m pyra.scripts.train ...",
            file=sys.stderr,
        )
    try:
        if isinstance(options, SeriesOptions):
            return _language(options)
        return _single(options) if options.is_single() else _several(options)
    finally:
        processes.leave()


def _with_task(argv: Sequence[str]) -> Sequence[str]:
    """Add the language task whose files ``--data`` holds, where no task is named."""
    if peek(argv, "task") is not None or (data := peek(argv, "data")) is None:
        return argv
    from pyra.tasks.fitting import processes
    from pyra.tasks.language.inferring import infer_task

    found = infer_task(data, peek(argv, "backbone"))
    if found is None:
        return argv
    if processes.is_main():
        print(f"note: --data {data} has the files of --task {found}", file=sys.stderr)
    return [*argv, "--task", found]


def _options(argv: Sequence[str] | None) -> ExperimentOptions:
    from pyra.tasks.data.cards import load_card

    try:
        return _parsed(argv)
    except ConfigError:
        task = peek(argv, "task")
        if task is not None:
            load_card(task)  # of an unknown one the rest may be said in the words of another kind of task
        raise


def _parsed(argv: Sequence[str] | None) -> ExperimentOptions:
    from pyra.tasks.options import METHODS
    from pyra.tasks.presets import FOLDER
    from pyra.tasks.protocols.options import PROTOCOLS, ExperimentOptions

    presets = [file.stem for file in sorted(FOLDER.glob("*.yaml"))]
    return parse(
        ExperimentOptions,
        argv,
        prog="pyra train",
        description=(
            "Adapt a backbone to a task, save the run, score it on the test split and time it.\n\n"
            f"methods (all but linear, full, adapter, tome and pyra are names for --peft, too):\n{listed(METHODS)}\n\n"
            f"protocols:\n{listed(PROTOCOLS)}\n\n"
            f"presets, the published recipe by name (--config NAME):\n{listed(dict.fromkeys(presets, ''))}\n\n"
            "Language tasks have options of their own: pyra train --task sst2 --help"
        ),
        example=(
            "pyra train --task demo --method pyra --rate 0.7 --output runs/a\n"
            "  pyra train --task demo --method pyra --rate 0.7 --protocol validation --tune lr=1e-3:4e-3\n"
            "  pyra train --config paper-high --task cifar100 --root vtab-1k --protocol published --seeds 3"
        ),
        presets=FOLDER,
    )


def _language_options(argv: Sequence[str] | None) -> SeriesOptions:
    from pyra.tasks.language.options import METHODS
    from pyra.tasks.language.series import SeriesOptions

    for name in ("protocol", "tune", "patience"):
        if peek(argv, name) is not None:
            raise ConfigError(f"--{name} is not for language tasks yet: their runs end with the last epoch")
    task = peek(argv, "task")
    verb = "pyra train" if task is None else f"pyra train --task {task}"
    return parse(
        SeriesOptions,
        argv,
        prog=verb,
        description=(
            "Adapt a language model to a task, save the run, and score it on the test split: texts classified by a new "
            f"head, or answered by prompt.\n\nmethods:\n{listed(METHODS)}"
        ),
        example=(
            "pyra train --task sst2 --root data/ --backbone bert-base-uncased --output runs/s\n"
            "  pyra train --task gsm8k --root data/ --backbone models/smollm2 --method pyra --rate 0.5\n"
            "  pyra train --task gsm8k --root data/ --backbone models/smollm2 --method dora --output runs/g"
        ),
    )


def _single(options: ExperimentOptions) -> int:
    from pyra.tasks.fitting import processes
    from pyra.tasks.reports import results_table
    from pyra.tasks.training import train

    result = train(options.run(options.output))
    if not processes.is_main():
        return 0
    print(results_table([result]))
    if result.skipped_images:
        print(f"unreadable images left out: {result.skipped_images}")
    if options.elastic:
        print(f"scored at the highest rate; any other: pyra evaluate {options.output} --rate {options.rates()[0]}")
    print(
        f"saved to {options.output}; next: pyra evaluate {options.output}, pyra export {options.output} --format onnx"
    )
    return 0


def _several(options: ExperimentOptions) -> int:
    from pyra.files import write_text
    from pyra.tasks.fitting import processes
    from pyra.tasks.protocols.experiment import experiment
    from pyra.tasks.reports.report import report

    results = experiment(options)
    if not processes.is_main():
        return 0
    folder = Path(options.output).expanduser()
    against = "linear" if len({result.method for result in results}) > 1 else None
    write_text(folder / "summary.md", report([str(folder)], style="markdown", against=against).text)
    print(report([str(folder)], against=against).text)
    if options.protocol is not None:
        for result in results if options.protocol == "published" else results[:1]:
            chosen = ", ".join(f"{name} {_short(value)}" for name, value in (result.chosen or {}).items())
            who = f" ({result.method}, seed {result.seed})" if options.protocol == "published" else ""
            print(f"chosen{who}: {chosen} ({result.selection}; {result.epochs:g} epochs at most)")
    print(f"saved to {folder}, a run for each seed; next: pyra evaluate {folder}/seed-{options.seed}")
    return 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _language(options: SeriesOptions) -> int:
    from pyra.tasks.fitting import processes
    from pyra.tasks.language.training import train_language
    from pyra.tasks.reports import results_table
    from pyra.tasks.reports.report import report
    from pyra.tasks.resuming import several

    series = options.runs()
    with several(Path(options.output)) if len(series) > 1 else nullcontext():
        found = [train_language(run) for run in series]
    if not processes.is_main():
        return 0
    if len(series) > 1:
        print(report([options.output]).text)
    else:
        print(results_table([result for result, _ in found]))
    for note in dict.fromkeys(note for _, notes in found for note in notes):
        print(note)
    print(f"saved to {options.output}; next: pyra evaluate {series[0].output}")
    return 0


if __name__ == "__main__":  # as `torchrun` and `accelerate launch` start it
    from pyra.scripts.main import main as pyra

    sys.exit(pyra(["train", *sys.argv[1:]]))

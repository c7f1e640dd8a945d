"""``pyra train``: adapt a backbone to a task and save the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyra.scripts.cli import parse, peek


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result as a table; a language task has options of its own."""
    from pyra.tasks.language.cards import is_text_task

    return _train_language(argv) if is_text_task(peek(argv, "task")) else _train(argv)


def _train(argv: Sequence[str] | None) -> int:
    from pyra.tasks.options import METHODS, RunOptions

    options = parse(
        RunOptions,
        argv,
        prog="pyra train",
        description=(
            "Adapt a backbone to a task, save the run, score it on the test split and time it.\n\n"
            f"methods (all but linear, full, adapter, tome and pyra are names for --peft, too):\n{_listed(METHODS)}\n\n"
            "Language tasks have options of their own: pyra train --task sst2 --help"
        ),
        example="pyra train --task demo --method pyra --rate 0.7 --output runs/a",
    )
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table
    from pyra.tasks.training import train

    quiet_libraries()
    result = train(options)
    print(results_table([result]))
    if result.skipped_images:
        print(f"{result.skipped_images} unreadable images were left out")
    if options.elastic:
        print(f"scored at the highest rate; any other: pyra evaluate {options.output} --rate {options.rates()[0]}")
    print(
        f"saved to {options.output}; next: pyra evaluate {options.output}, pyra export {options.output} --format onnx"
    )
    return 0


def _train_language(argv: Sequence[str] | None) -> int:
    from pyra.tasks.language.options import METHODS, LanguageOptions

    options = parse(
        LanguageOptions,
        argv,
        prog="pyra train",
        description=(
            "Adapt a language model to a task, save the run, and score it on the test split: texts classified by a new "
            f"head, or answered by prompt.\n\nmethods:\n{_listed(METHODS)}"
        ),
        example=(
            "pyra train --task sst2 --root data/ --backbone bert-base-uncased --output runs/s\n"
            "  pyra train --task gsm8k --root data/ --backbone models/smollm2 --method dora --output runs/g"
        ),
    )
    from pyra.tasks.language.training import train_language
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    quiet_libraries()
    result, notes = train_language(options)
    print(results_table([result]))
    for note in notes:
        print(note)
    print(f"saved to {options.output}; next: pyra evaluate {options.output}")
    return 0


def _listed(methods: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<17}{text}" for name, text in methods.items())

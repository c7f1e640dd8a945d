"""``pyra train``: adapt a backbone to a task and save the run."""

from __future__ import annotations

from collections.abc import Sequence

from pyra.scripts.cli import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result as a table."""
    from pyra.tasks.options import METHODS, RunOptions

    listed = "\n".join(f"  {name:<17}{text}" for name, text in METHODS.items())
    options = parse(
        RunOptions,
        argv,
        prog="pyra train",
        description=(
            "Adapt a backbone to a task, save the run, score it on the test split and time it.\n\n"
            f"methods (all but linear, full, adapter, tome and pyra are names for --peft, too):\n{listed}"
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


if __name__ == "__main__":  # as `torchrun` and `accelerate launch` start it
    import sys

    from pyra.scripts.main import main as pyra

    sys.exit(pyra(["train", *sys.argv[1:]]))

"""``pyra rl``: train a decoder on rewards that can be verified, and save the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyra.scripts.cli import listed, parse

if TYPE_CHECKING:
    from pyra.tasks.results import RunResult

_DATA = (
    '--data holds lines such as {"prompt": "What is 2 + 3?", "answer": "5"}; a prompt is text, or messages that '
    "end with the user's. Answers are compared as numbers, or by math-verify."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result and how the training went."""
    from pyra.tasks.posttraining.options import METHODS, need_trl
    from pyra.tasks.posttraining.rl_options import ALGORITHMS, REWARDS, RlOptions

    options = parse(
        RlOptions,
        argv,
        prog="pyra rl",
        description=(
            "Train a decoder on rewards that can be verified: it answers each prompt several times, and answers that "
            f"are better than the others become likelier.\n\n{_DATA}\n\n"
            f"algorithms:\n{listed(ALGORITHMS)}\n\nrewards:\n{listed(REWARDS)}\n\nmethods:\n{listed(METHODS)}"
        ),
        example=(
            "pyra rl --backbone models/smollm2 --task arithmetic --steps 50 --output runs/rl\n"
            "  pyra rl --adapter runs/sft --data problems.jsonl --algorithm grpo --output runs/grpo\n"
            "  pyra rl --backbone models/smollm2 --data problems.jsonl --method pyra --rate 0.5 --output runs/m"
        ),
    )
    need_trl("rl")
    from pyra.tasks.fitting import processes
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.posttraining.rl import summary_of, train_rl
    from pyra.tasks.reports import results_table

    try:
        result, notes, curves = train_rl(options)
    finally:
        processes.leave()
    if not processes.is_main():
        return 0
    print(results_table([result]))
    print(_course(options.algorithm, result, summary_of(curves)))
    for note in dict.fromkeys(notes):
        print(note)
    print(f"saved to {options.output}, with curves.png")
    return 0


def _course(algorithm: str, result: RunResult, summary: Mapping[str, float]) -> str:
    """Return how the training went, as a table."""
    from tabulate import tabulate

    row = {"algorithm": algorithm}
    if result.value_before is not None:
        row |= {"right before": f"{100 * result.value_before:.1f} %", "right after": f"{100 * result.value:.1f} %"}
    for name in ("reward", "length", "entropy"):
        if f"first_{name}" in summary:
            row[name] = f"{summary[f'first_{name}']:.2f} to {summary[f'last_{name}']:.2f}"
    named = {"clipped": "clipped", "trajectories_rolling_back": "rolling back", "trajectories_zeroed": "beyond budget"}
    row |= {title: f"{100 * summary[name]:.1f} %" for name, title in named.items() if name in summary}
    return str(tabulate([row], headers="keys", disable_numparse=True))


if __name__ == "__main__":  # as `torchrun` and `accelerate launch` start it
    from pyra.scripts.main import main as pyra

    sys.exit(pyra(["rl", *sys.argv[1:]]))

"""``pyra compress-experts``: drop the experts of a mixture that a task does not use."""

from __future__ import annotations

from collections.abc import Sequence

from pyra.scripts.cli import parse
from pyra.tasks.language.compress_options import CompressOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score, prune, write, compare, print a table."""
    options = parse(
        CompressOptions,
        argv,
        prog="pyra compress-experts",
        description=(
            "Score the routed experts of a JoyAI or DeepSeek-V3 checkpoint on a task's training text, drop those of "
            "each layer that\nscore lowest, and write what is left as a checkpoint. Fewer experts save memory; fewer "
            "active ones (--active) save products.\nAnswers of the test split are scored before and after: nats a "
            "token of the right answer, lower is better."
        ),
        example=(
            "pyra compress-experts --backbone JoyAI-LLM-Flash --task gsm8k --root data/ --keep 0.5 --output pruned\n"
            "  pyra compress-experts --backbone tiny --data gsm8k/ --keep 8 --active 3 --compare-active 3,2 --baseline"
        ),
    )
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.language.compressing import compress_experts
    from pyra.tasks.reports.experts import experts_table

    record = compress_experts(options)
    print(experts_table(record.variants))
    text = record.calibration
    print(
        f"\nexperts scored on {text['examples']} training examples of {options.task} ({text['tokens']:,} tokens), NLL "
        f"in nats a token of the answers of {record.test['examples']} test examples"
    )
    left_out = text["left_out"] + record.test["left_out"]
    if left_out:
        print(f"examples that are longer than what is read, left out: {left_out}")
    for what in record.written["left_out"]:
        print(f"not written: {what}")
    if record.written["opened_with"] is not None:
        difference = record.written["largest_difference"]
        print(f"opened again as {record.written['opened_with']}: logits differ by {difference:.1e} at most")
    print(
        f"written to {options.output}; next: pyra evaluate {options.output}, "
        f"pyra train --backbone {options.output} --task {options.task} --method lora"
    )
    return 0

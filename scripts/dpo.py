"""``pyra dpo``: train a decoder to prefer some answers to others."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pyra.scripts.cli import listed, parse
from pyra.scripts.posttraining import train_and_tell


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result as a table."""
    from pyra.tasks.posttraining.dpo_options import DpoOptions
    from pyra.tasks.posttraining.options import METHODS, need_trl

    options = parse(
        DpoOptions,
        argv,
        prog="pyra dpo",
        description=(
            "Train a decoder on preferences (DPO, arXiv 2305.18290): rows of prompt, chosen and rejected, text or "
            "messages.\nThe prompt's tokens may merge. Scored is the share of held-out pairs whose chosen answer has "
            "gained more\nthan the rejected one, against the reference.\n\n"
            f"methods:\n{listed(METHODS)}"
        ),
        example=(
            "pyra dpo --adapter runs/sft --data pairs.jsonl --output runs/dpo\n"
            "  pyra dpo --backbone models/smollm2 --data pairs/ --method pyra --rate 0.5 --beta 0.05"
        ),
    )
    need_trl("dpo")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.posttraining.dpo import train_dpo

    return train_and_tell(options, train_dpo)


if __name__ == "__main__":  # as `torchrun` and `accelerate launch` start it
    from pyra.scripts.main import main as pyra

    sys.exit(pyra(["dpo", *sys.argv[1:]]))

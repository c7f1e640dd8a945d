"""``pyra sft``: train a decoder on chats."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pyra.scripts.cli import listed, parse
from pyra.scripts.posttraining import train_and_tell


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the result as a table."""
    from pyra.tasks.posttraining.options import METHODS, need_trl
    from pyra.tasks.posttraining.sft_options import SftOptions

    options = parse(
        SftOptions,
        argv,
        prog="pyra sft",
        description=(
            "Train a decoder on chats: rows of messages (role and content), or of a prompt and its completion.\nThe "
            "loss is that of the assistant's turns; what was said before is a prompt, whose tokens may merge.\n"
            "Held-out answers are scored: nats a token, lower is better.\n\n"
            f"methods:\n{listed(METHODS)}"
        ),
        example=(
            "pyra sft --backbone models/smollm2 --data chats.jsonl --method pyra --rate 0.5 --output runs/sft\n"
            "  pyra sft --backbone models/joyai --data owner/name --method lora --packing --max-length 4096\n"
            "  torchrun --nproc_per_node 2 -m pyra.scripts.sft --backbone models/smollm2 --data chats/"
        ),
    )
    need_trl("sft")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.posttraining.sft import train_sft

    return train_and_tell(options, train_sft)


if __name__ == "__main__":  # as `torchrun` and `accelerate launch` start it
    from pyra.scripts.main import main as pyra

    sys.exit(pyra(["sft", *sys.argv[1:]]))

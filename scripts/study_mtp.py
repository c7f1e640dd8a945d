"""How many drafted tokens a JoyAI accepts, and how fast it answers; ``python -m pyra.scripts.study_mtp``.

Drafts of each length answer the same prompts in turns, and must give the text that the decoder gives without them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("", "folder of a JoyAI checkpoint with an MTP layer and a tokenizer")
    task: str = option("gsm8k", "language task whose test prompts are answered")
    root: str | None = option(None, "folder with a folder of each task's files (PYRA_DATA by default)")
    data: str | None = option(None, "folder with the task's files themselves")
    limit: int = option(16, "prompts (a fixed draw)")
    draft_tokens: tuple[int, ...] = option((1, 2, 3), "tokens of a draft, several lengths; 0 is always measured")
    max_new_tokens: int = option(64, "tokens of each answer")
    rounds: int = option(5, "timed turns")
    rate: float | None = option(None, "merge the prompts at this rate, without training")
    clock: str = option(
        "wall", "time of the clock, or seconds of this process on the CPU (for one thread)", choices=("wall", "cpu")
    )
    device: str = option("auto", "auto, cpu or cuda")
    output: str = option("mtp.json", "file for the rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_mtp",
        description="Measure how many tokens that the MTP layer drafts are accepted, and the speed of answers.",
        example="python -m pyra.scripts.study_mtp --backbone tiny-mtp --root data/ --draft-tokens 1,2,3",
    )
    if (
        options.limit < 1
        or options.rounds < 1
        or options.max_new_tokens < 2
        or min(options.draft_tokens, default=0) < 1
    ):
        raise ConfigError("--limit, --rounds and --draft-tokens must be 1 at least, --max-new-tokens 2")
    from pyra.files import read_json, write_json
    from pyra.tasks.language.mtp_study import mtp_table, study_mtp
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    found = study_mtp(options)
    print(mtp_table(found["rows"]))
    told = {name: value for name, value in asdict(options).items() if name not in ("root", "data", "output")}
    told["backbone"] = Path(options.backbone).name
    made = Path(options.backbone).expanduser() / "training.json"
    kept = ("options", "score", "seconds")
    training = {} if not made.is_file() else {k: v for k, v in read_json(made).items() if k in kept}
    write_json(options.output, {"options": told, "mtp_training": training, **found})
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

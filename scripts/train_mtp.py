"""Train the MTP layer of a JoyAI checkpoint on the texts of a task; ``python -m pyra.scripts.train_mtp``.

The written folder holds the layer in a shard of its own, and beside it the decoder as it was, to the bit, unless an
adapter trains along.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse

if TYPE_CHECKING:
    from pyra.tasks.language.mtp_training import MtpRecipe


@dataclass(kw_only=True)
class MtpOptions:
    """Options of the training."""

    backbone: str = option("", "folder of a JoyAI checkpoint with a tokenizer; its MTP layer, if any, is trained on")
    task: str = option("gsm8k", "language task whose training texts are learned")
    root: str | None = option(None, "folder with a folder of each task's files (PYRA_DATA by default)")
    data: str | None = option(None, "folder with the task's files themselves")
    limit: int | None = option(None, "training texts (a fixed draw)")
    trunk: str = option(
        "frozen", "frozen: the decoder stays; lora: an adapter of its attention trains, too, and is folded in"
    )
    weight: float = option(0.1, "of the layer's loss beside the decoder's, for --trunk lora")
    answers_only: bool = option(False, "take no loss of prompts")
    rank: int = option(16, "of the adapter, for --trunk lora")
    max_length: int | None = option(None, "tokens of a text at most; longer ones are left out")
    steps: int = option(500, "steps of AdamW")
    batch_size: int = option(16, "texts a step")
    lr: float = option(1e-3, "peak learning rate, one cosine over all steps")
    seed: int = option(0, "random seed")
    device: str = option("auto", "auto, cpu or cuda")
    output: str = option("", "folder to write to; it must not be there yet")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure on the test texts, write the checkpoint."""
    options = parse(
        MtpOptions,
        argv,
        prog="python -m pyra.scripts.train_mtp",
        description="Train the layer of a JoyAI that drafts tokens (multi-token prediction, MTP).",
        example="python -m pyra.scripts.train_mtp --backbone tiny-joyai --task gsm8k --root data/ --output tiny-mtp",
    )
    if not options.output.strip():
        raise ConfigError("--output is missing: name a folder to write to")
    folder = Path(options.output).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose another --output")
    from pyra.tasks.language.mtp_training import MtpRecipe

    names = ("trunk", "weight", "answers_only", "rank", "steps", "batch_size", "lr", "seed")
    return _train(options, folder, MtpRecipe(**{name: getattr(options, name) for name in names}))


def _train(options: MtpOptions, folder: Path, recipe: MtpRecipe) -> int:
    from pyra.backbones.joyai_checkpoint import check_checkpoint, check_tokenizer, load_model, save_checkpoint
    from pyra.files import write_json
    from pyra.tasks.language.calibration import encoded
    from pyra.tasks.language.data import load_text_task
    from pyra.tasks.language.models import load_encoder, longest
    from pyra.tasks.language.mtp_training import held_out_mtp, train_mtp
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment
    from pyra.tasks.runs import resolve_device

    quiet_libraries()
    device = resolve_device(options.device)
    checkpoint = check_checkpoint(options.backbone)
    task, encoder = load_text_task(options.task, options.root, options.data), load_encoder(options.backbone)
    check_tokenizer(encoder.tokenizer, checkpoint.config)
    length = longest(options.backbone, checkpoint.config, encoder.tokenizer, options.max_length)
    train, test = (encoded(task, encoder, *what, length) for what in (("train", options.limit), ("test", 200)))
    start = time.perf_counter()
    model, losses = train_mtp(
        load_model(options.backbone).to(device),
        train.rows,
        encoder.pad_id,
        recipe,
        device,
        checkpoint.folder if checkpoint.mtp else None,
    )
    seconds = time.perf_counter() - start
    score = held_out_mtp(model, test.rows, encoder, options.batch_size)
    save_checkpoint(model, folder)
    encoder.tokenizer.save_pretrained(folder)
    told = {name: value for name, value in asdict(options).items() if name not in ("root", "data", "output")}
    told["backbone"] = Path(options.backbone).name
    record = {"options": told, "losses": losses, "train": train.told, "test": test.told, "score": score}
    where = environment(str(device))
    write_json(folder / "training.json", {**record, "seconds": seconds, "environment": where})
    print(
        f"test answers: {score['mtp']:.3f} nats a token two ahead, the decoder {score['decoder']:.3f} one ahead; "
        f"the same first choice for {100 * score['agree']:.1f} % of the tokens"
    )
    trunk = "as it was" if options.trunk == "frozen" else "adapted"
    print(f"{options.steps} steps in {seconds:.0f} s, decoder {trunk}; written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a tiny JoyAI from nothing on the texts of tasks; ``python -m pyra.scripts.pretrain_tiny_joyai``.

The result is a folder in the published layout with a tokenizer, for tests and studies in which quality means something.
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
    from pyra.tasks.language.pretraining import Recipe

_SCORED = 300  # test examples of each task


@dataclass(kw_only=True)
class PretrainOptions:
    """Options of the pretraining run."""

    tasks: tuple[str, ...] = option(("gsm8k",), "language tasks whose training texts are learned, a list")
    root: str | None = option(None, "folder with a folder of each task's files (PYRA_DATA by default)")
    data: str | None = option(None, "folder with the files themselves, of a single task")
    vocabulary: int = option(1024, "tokens of the tokenizer, which is trained on the same texts")
    hidden_size: int = option(128, "width of the model")
    layers: int = option(4, "layers; the first is dense")
    experts: int = option(16, "experts of each other layer")
    active: int = option(4, "experts of a token")
    steps: int = option(500, "steps of AdamW")
    batch_size: int = option(16, "texts a step")
    length: int = option(256, "tokens of a text")
    lr: float = option(3e-3, "peak learning rate, one cosine over all steps")
    seed: int = option(0, "random seed")
    format: str = option(
        "joyai_llm_flash", "what config.json calls the model", choices=("joyai_llm_flash", "deepseek_v3")
    )
    output: str = option("runs/tiny-joyai", "folder to write to; it must not be there yet")


def main(argv: Sequence[str] | None = None) -> int:
    """Train a tokenizer and a model, score it on the test texts, write both."""
    options = parse(
        PretrainOptions,
        argv,
        prog="python -m pyra.scripts.pretrain_tiny_joyai",
        description="Train a tiny JoyAI (a mixture of experts) from nothing on the texts of language tasks.",
        example="python -m pyra.scripts.pretrain_tiny_joyai --tasks gsm8k,sst2 --root data/ --output tiny-joyai",
    )
    folder = Path(options.output).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose another --output")
    if options.data is not None and (len(options.tasks) != 1 or options.root is not None):
        raise ConfigError("--data goes with a single task and without --root")
    from pyra.tasks.language.pretraining import Recipe

    names = ("hidden_size", "layers", "experts", "active", "steps", "batch_size", "length", "lr", "seed")
    return _train(options, folder, Recipe(**{name: getattr(options, name) for name in names}))


def _train(options: PretrainOptions, folder: Path, recipe: Recipe) -> int:
    from tqdm import tqdm

    from pyra.backbones.joyai_checkpoint import check_tokenizer, save_checkpoint
    from pyra.files import write_json
    from pyra.tasks.language.data import load_text_task
    from pyra.tasks.language.pretraining import held_out, new_model, pretrain, texts_of, train_tokenizer
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment

    quiet_libraries()
    tasks = [load_text_task(name, options.root, options.data) for name in options.tasks]
    texts = texts_of(tasks, "train")
    tokenizer = train_tokenizer(texts, options.vocabulary)
    model = new_model(recipe, options.vocabulary)
    start = time.perf_counter()
    with tqdm(total=options.steps, unit="step", leave=False, disable=None) as bar:

        def tell(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.2f}")
            bar.update()

        losses = pretrain(model, tokenizer, texts, recipe, tell)
    seconds = time.perf_counter() - start
    check_tokenizer(tokenizer, model.config)
    scores = {task.name: held_out(model, tokenizer, texts_of([task], "test", _SCORED), texts, recipe) for task in tasks}
    save_checkpoint(model, folder, model_type=options.format)
    tokenizer.save_pretrained(folder)
    settings = {name: value for name, value in asdict(options).items() if name not in ("root", "data", "output")}
    write_json(
        folder / "training.json",
        {"options": settings, "losses": losses, "test": scores, "seconds": seconds, "environment": environment("cpu")},
    )
    for name, score in scores.items():
        print(f"{name}: {score['model']:.3f} nats a token on the test texts; by frequency alone {score['unigram']:.3f}")
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights:,} weights, {options.steps} steps in {seconds:.0f} s; written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

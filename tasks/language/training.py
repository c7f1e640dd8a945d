"""Training on ``transformers.Trainer``: from options to a finished run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from pyra.adapters import fold_adapter, save_adapter
from pyra.adapters.adalora import RankAllocation
from pyra.adapters.recipe import parameter_groups
from pyra.errors import ConfigError, TrainingError
from pyra.files import write_json
from pyra.tasks.fitting.trainer import MovingRanks, ProgressBar
from pyra.tasks.language.answering import Asking, answer
from pyra.tasks.language.data import Example, load_text_task
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.results import language_result
from pyra.tasks.language.runs import ADAPTER, Subject, adapted, new_subject, save_language_run
from pyra.tasks.language.scoring import collate
from pyra.tasks.language.tokens import IGNORED, mask, pad
from pyra.tasks.output import staged_output
from pyra.tasks.results import RunResult
from pyra.tasks.runs import DTYPES, resolve_device

Row = dict[str, Any]


class Rows(Dataset[Row]):
    """Encoded examples."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def train_language(options: LanguageOptions) -> tuple[RunResult, list[str]]:
    """Train and score one run on a language task, and write its folder; returns its row, and what is worth knowing.

    All that can be wrong with the input is found before the output folder is touched, and an earlier run there is
    replaced when the new one is complete.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    set_seed(options.seed)
    device = resolve_device(options.device)
    task = load_text_task(options.task, options.root)
    subject = new_subject(options, task)
    test = task.split("test", options.limit)
    rows, left_out = training_rows(subject, task.split("train", options.limit))
    model = adapted(subject.model, options)
    with staged_output(options.output, "run", options.overwrite) as folder:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        seconds = fit(model, subject, rows, options, folder, device)
        model.cpu().eval()
        save_adapter(model, folder / ADAPTER)
        save_language_run(folder, options, task, left_out)
        folded = dataclasses.replace(subject, model=fold_adapter(model).to(device).eval())
        scored = answer(folded, task, test, asking(options, f"{options.method}: test"))
        result = language_result(
            task,
            scored,
            folded.model,
            options,
            device,
            split="test",
            trained_parameters=trained,
            train_seconds=seconds,
        )
        write_json(folder / "predictions.json", scored.record("test"))
        write_json(folder / "result.json", result)
    notes = [f"{left_out} training examples are longer than {subject.max_length} tokens, and were left out"]
    return result, (notes if left_out else []) + scored.notes()


def asking(options: LanguageOptions, label: str) -> Asking:
    """Return how a run puts examples to its model."""
    return Asking(options.batch_size, DTYPES[options.dtype], options.max_new_tokens, label=label)


def training_rows(subject: Subject, examples: Sequence[Example]) -> tuple[list[Row], int]:
    """Encode what is trained on.

    A head reads a text cut to the length that is read. A decoder learns an answer whole, with the end-of-text token
    after it, or not at all: examples that are longer are left out.

    Returns:
        The rows, and how many examples were left out.

    Raises:
        ConfigError: where all are longer than what is read.
    """
    if subject.answer == "head":
        return [{**subject.encoder.texts(e.texts, subject.max_length), "labels": e.label} for e in examples], 0
    rows = []
    for example in examples:
        (found,) = subject.encoder.answered(example.prompt, [example.answer])
        ids = [*found.ids, *subject.encoder.end]
        if len(ids) <= subject.max_length:
            rows.append({"input_ids": ids, "labels": [IGNORED] * found.start + ids[found.start :]})
    if not rows:
        raise ConfigError(
            f"--max-length {subject.max_length}: every training example is longer, with its prompt; raise it"
        )
    return rows, len(examples) - len(rows)


def batcher(answered_by_head: bool, pad_id: int) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    """Return what makes a batch of rows, as long as its longest row: padded at the right, where no loss is taken."""

    def of_head(rows: Sequence[Row]) -> dict[str, Tensor]:
        texts = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        return {**collate(texts, pad_id), "labels": torch.tensor([row["labels"] for row in rows])}

    def of_decoder(rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        labels = pad([row["labels"] for row in rows], IGNORED)
        return {"input_ids": pad(ids, pad_id), "attention_mask": mask(ids), "labels": labels}

    return of_head if answered_by_head else of_decoder


def fit(
    model: nn.Module,
    subject: Subject,
    rows: Sequence[Row],
    options: LanguageOptions,
    folder: Path,
    device: torch.device,
) -> float:
    """Train the weights that require gradients; returns the seconds it took.

    Raises:
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.01},
        warmup_steps=0.1,
        logging_steps=10,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        seed=options.seed,
        dataloader_pin_memory=device.type != "cpu",
    )
    start = time.perf_counter()
    groups = parameter_groups(model, options.learning_rate, options.learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(rows),
        data_collator=batcher(subject.answer == "head", subject.encoder.pad_id),
        optimizers=(optimizer, None),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar(f"{options.method}: training"))
    ranks = RankAllocation.of(model, math.ceil(options.epochs * len(trainer.get_train_dataloader())))
    if ranks is not None:  # PEFT adds AdaLoRA's penalty itself where a model returns its loss
        trainer.add_callback(MovingRanks(ranks))
    trainer.train()
    seconds = time.perf_counter() - start
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise TrainingError(f"{len(broken)} trained tensors hold NaN or infinities ({broken[0]}): lower --lr")
    with contextlib.suppress(OSError):  # nothing is saved in it: leave no empty folder
        (folder / "checkpoints").rmdir()
    return seconds

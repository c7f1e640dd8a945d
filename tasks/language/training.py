"""Training on ``transformers.Trainer``: from options to a finished run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyra.adapters import fold_adapter
from pyra.adapters.adalora import RankAllocation
from pyra.adapters.recipe import parameter_groups
from pyra.errors import ConfigError, TrainingError
from pyra.files import write_json
from pyra.tasks.fitting import processes
from pyra.tasks.fitting.callbacks import MovingRanks
from pyra.tasks.fitting.clock import Clock
from pyra.tasks.fitting.fit import Fitted, forget_checkpoints
from pyra.tasks.fitting.loop import (
    losses_of,
    refuse_broken,
    run_through,
    steps_of,
    tracking,
    training_arguments,
    where_to_go_on,
)
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.language.answering import Asking, answer, room_for_prompts
from pyra.tasks.language.data import Example, TextTask, examples_digest, load_text_task
from pyra.tasks.language.models import backbone_digest
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.results import trained_row
from pyra.tasks.language.runs import Subject, adapted, begin_run, new_subject, save_language_run
from pyra.tasks.language.scored import Scored
from pyra.tasks.language.scoring import collate
from pyra.tasks.language.tokens import IGNORED, mask, pad
from pyra.tasks.results import PREDICTIONS_FILE, RESULT_FILE, RunResult, read_result
from pyra.tasks.resuming import finished_as, shared_folder
from pyra.tasks.runs import DTYPES
from pyra.tasks.training import (
    TRAINING,
    card_info,
    ready,
    refuse_output_in_data,
    save_trained,
    write_card,
)
from pyra.tasks.usage import Meter

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
    replaced when the new one is complete. With ``options.resume`` an interrupted run goes on from its newest complete
    checkpoint, and a finished one is left as it is. In a distributed run every process calls this and gets the result.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    device = ready(options)
    refuse_output_in_data(options)
    task = load_text_task(options.task, options.root, options.data)
    if options.resume:
        earlier = processes.on_main(lambda: finished_as(begin_run(options, task)))
        if earlier is not None:
            return earlier, []
    subject = new_subject(options, task)
    if subject.answer == "generation":
        room_for_prompts(subject, options.max_new_tokens)  # found now, and not after the training
    examples, test = task.split("train", options.limit), task.split("test", options.limit)
    rows, trained_on = training_rows(subject, examples)
    left_out = len(examples) - len(trained_on)
    notes = [f"training examples longer than {subject.max_length} tokens, left out: {left_out}"]
    weights = backbone_digest(subject.model)
    subject = dataclasses.replace(subject, model=adapted(subject.model, options))
    begin = begin_run(options, task, left_out)
    with shared_folder(begin) as folder:
        if (folder / RESULT_FILE).exists():  # the process was killed between its last file and the swap
            return read_result(folder), []
        processes.on_main(lambda: save_language_run(folder, begin, task.labels))
        result, scored = _run(options, task, subject, rows, trained_on, test, folder, device, weights)
    return result, (notes if left_out else []) + scored.notes()


def _run(
    options: LanguageOptions,
    task: TextTask,
    subject: Subject,
    rows: Sequence[Row],
    trained_on: Sequence[Example],
    test: Sequence[Example],
    folder: Path,
    device: torch.device,
    weights: str,
) -> tuple[RunResult, Scored]:
    model = subject.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    meter = Meter(device).start()
    try:
        fitted = fit(model, subject, rows, options, folder, device)
    except TrainingError:  # its checkpoints lead to the same end
        processes.on_main(lambda: forget_checkpoints(folder))
        raise
    model.cpu().eval()
    info = card_info(options.backbone, task.name)
    described = processes.on_main(lambda: save_trained(model, folder, info))
    folded = dataclasses.replace(subject, model=fold_adapter(model).to(device).eval())
    scored = answer(folded, task, test, asking(options, f"{options.label}: test"))

    def finish() -> RunResult:
        result = trained_row(
            task,
            scored,
            folded,
            options,
            trained_on,
            trained_parameters=trained,
            train_seconds=fitted.seconds,
            weights_sha256=weights,
            test_sha256=examples_digest(test),
            **meter.stop().columns(),
        )
        write_json(folder / TRAINING, {"losses": fitted.losses, "scores": fitted.scores})
        write_json(folder / PREDICTIONS_FILE, scored.record("test", test))
        write_card(folder, described, info, result)
        write_json(folder / RESULT_FILE, result)
        forget_checkpoints(folder)
        return result

    return processes.on_main(finish), scored


def asking(options: LanguageOptions, label: str) -> Asking:
    """Return how a run puts examples to its model."""
    return Asking(options.batch_size, DTYPES[options.dtype], options.max_new_tokens, label=label)


def training_rows(subject: Subject, examples: Sequence[Example]) -> tuple[list[Row], list[Example]]:
    """Encode what is trained on.

    A head reads a text cut to the length that is read. A decoder learns an answer whole, with the end-of-text token
    after it, or not at all: examples that are longer are left out.

    Returns:
        The rows, and the example of each.

    Raises:
        ConfigError: where all are longer than what is read.
    """
    if subject.answer == "head":
        rows = [{**subject.encoder.texts(one.texts, subject.max_length), "labels": one.label} for one in examples]
        return rows, list(examples)
    rows, kept = [], []
    for example in examples:
        (found,) = subject.encoder.answered(example.prompt, [example.answer])
        ids = [*found.ids, *subject.encoder.end]
        if len(ids) <= subject.max_length:
            rows.append({"input_ids": ids, "labels": [IGNORED] * found.start + ids[found.start :]})
            kept.append(example)
    if not rows:
        raise ConfigError(
            f"--max-length {subject.max_length}: every training example is longer, with its prompt; raise it"
        )
    return rows, kept


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
) -> Fitted:
    """Train the weights that require gradients, from the newest complete checkpoint in the folder if there is one.

    The loss is the model's own. Every process of a distributed run calls this.

    Raises:
        ConfigError: for a batch that the processes cannot share.
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """
    clock = Clock()
    saved, resumed = where_to_go_on(folder)

    def optimizer() -> torch.optim.Optimizer:
        groups = parameter_groups(model, options.learning_rate, options.learning_rate)
        return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)

    with tracking(options, folder):
        trainer = KeepingTrainer(
            optimizer,
            model=model,
            args=training_arguments(options, saved, device, len(rows)),
            train_dataset=Rows(rows),
            data_collator=batcher(subject.answer == "head", subject.encoder.pad_id),
        )
    trainer.kept["clock"] = clock
    steps_an_epoch, steps = steps_of(trainer, options)
    ranks = RankAllocation.of(model, steps)
    if ranks is not None:  # PEFT adds AdaLoRA's penalty itself where a model returns its loss
        trainer.kept["ranks"] = ranks
        trainer.add_callback(MovingRanks(ranks))
    run_through(trainer, options, steps_an_epoch, resumed)
    refuse_broken(model)
    return Fitted(clock.seconds(), losses_of(trainer.state), [])

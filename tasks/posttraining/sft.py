"""Supervised fine-tuning on chats: the loss is that of the assistant's turns alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pyra.errors import ConfigError
from pyra.tasks.fitting.fit import Fitted
from pyra.tasks.language.answer_loss import AnswerLoss
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.thinking import thinking_switch
from pyra.tasks.language.tokens import Answered, Encoder
from pyra.tasks.posttraining.chat import COMMON, read_chats
from pyra.tasks.posttraining.encoding import Kept, encode_chats, labelled
from pyra.tasks.posttraining.rows import Row, read_rows
from pyra.tasks.posttraining.runs import continued, new_start
from pyra.tasks.posttraining.scoring import cost_columns, score_answers
from pyra.tasks.posttraining.sft_options import SftOptions
from pyra.tasks.posttraining.trainer import PostTrainer, fit_with
from pyra.tasks.posttraining.working import Score, carry_out, finished_run, told_of_rows, unread_keys
from pyra.tasks.results import RunResult
from pyra.tasks.training import ready, refuse_output_in_data

METRIC = "answer_nll"
LOGGED = ("mean_token_accuracy", "entropy")
KEYS = ("messages", "prompt", "completion", *COMMON)
ISOLATES = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
"""Attention implementations that keep the samples of a packed row apart by their positions."""


class ChatTrainer(PostTrainer, SFTTrainer):
    """Modifications: those of :class:`PostTrainer`."""


def train_sft(options: SftOptions) -> tuple[RunResult, list[str]]:
    """Train a decoder on chats and write the run's folder; returns its row, and what is worth knowing.

    The score is the mean negative log-likelihood of the held-out answers, in nats a token. All that can be wrong with
    the input is found before the output folder is touched. With ``options.resume`` an interrupted run goes on from its
    newest complete checkpoint, and a finished one is left as it is. In a distributed run every process calls this.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    device = ready(options)
    refuse_output_in_data(options)
    options = continued(options)
    rows = read_rows(options.data, options.held_out, options.limit)
    if (earlier := finished_run(options, rows)) is not None:
        return earlier, []
    start = new_start(options)
    subject = start.subject
    train, test = (encoded(part, subject, options) for part in (rows.train, rows.test))
    if options.packing:
        refuse_packing(subject.model)
    left_out = train.left_out + test.left_out
    work = _Supervised(options, subject, train, test, device)
    result = carry_out(options, rows, subject, device, left_out, work)
    of_data = [*told_of_rows(rows, left_out, subject.max_length), *unread_keys(rows, KEYS)]
    return result, [*start.notes, *work.notes, *of_data]


def encoded(rows: Sequence[Row], subject: Subject, options: SftOptions) -> Kept:
    """Turn rows into token ids; errors as of :func:`read_chats` and :func:`encode_chats`."""
    chats = read_chats(rows, thinking_switch(subject.encoder.tokenizer))
    return encode_chats(chats, subject.encoder, subject.max_length, options.turns)


class _Supervised:
    """Trains on chats, and scores the answers that were held out before and after."""

    def __init__(self, options: SftOptions, subject: Subject, train: Kept, test: Kept, device: torch.device) -> None:
        self.options, self.subject, self.train, self.test, self.device = options, subject, train, test, device
        self.before: AnswerLoss | None = None
        self.notes: list[str] = []

    def fit(self, model: nn.Module, folder: Path) -> Fitted:
        """Train."""
        start = replace(self.subject, model=model.to(self.device).eval())
        self.before = score_answers(start, self.test.rows, self.options, self.device, f"{self.options.label}: before")
        return fit(model, self.subject, self.train.rows, self.options, folder, self.device)

    def score(self, subject: Subject) -> Score:
        """Score."""
        loss = score_answers(subject, self.test.rows, self.options, self.device, f"{self.options.label}: test")
        told = {"answer_nll": loss.mean, "answers": len(loss.nats), "tokens": sum(loss.tokens)}
        if self.before is not None:
            more, error = loss.difference(self.before)
            told |= {"answer_nll_before": self.before.mean, "difference": more, "standard_error": error}
            self.notes = [
                f"held-out answers: {self.before.mean:.3f} nats a token before, {loss.mean:.3f} after (difference "
                f"{more:+.3f}, standard error {error:.3f}, {len(loss.nats)} answers)"
            ]
        columns = {
            "answer_nll": loss.mean,
            "num_test": len(loss.nats),
            "train_tokens": self.train.answer_tokens,
            **cost_columns(subject, self.test.rows),
        }
        return Score(METRIC, loss.mean, False, columns, {"answer_nats": loss.nats, "answer_tokens": loss.tokens}, told)


def fit(
    model: nn.Module,
    subject: Subject,
    rows: Sequence[Answered],
    options: SftOptions,
    folder: Path,
    device: torch.device,
) -> Fitted:
    """Train an adapted model on rows; arguments and errors as of :func:`pyra.tasks.posttraining.trainer.fit_with`."""
    data = training_data(rows, subject.max_length if options.packing else None)

    def make(optimizer: Callable[[], torch.optim.Optimizer], values: dict[str, Any]) -> ChatTrainer:
        return chat_trainer(model, subject.encoder, data, optimizer, values, packed=options.packing)

    return fit_with(make, model, options, folder, device, len(data), LOGGED)


def training_data(rows: Sequence[Answered], packed_to: int | None = None) -> datasets.Dataset:
    """Return rows as trl takes them, or several of them in one of ``packed_to`` tokens at most, none of them cut."""
    data = datasets.Dataset.from_list([labelled(row) for row in rows])
    return data if packed_to is None else pack_dataset(data, packed_to, "bfd")


def chat_trainer(
    model: nn.Module,
    encoder: Encoder,
    data: datasets.Dataset,
    optimizer: Callable[[], torch.optim.Optimizer],
    values: dict[str, Any],
    *,
    packed: bool = False,
) -> ChatTrainer:
    """Return the trainer of an adapted model on data of :func:`training_data`.

    Args:
        model: adapted.
        encoder: whose tokenizer it was made with.
        data: rows, or packed rows.
        optimizer: makes the optimiser.
        values: arguments of ``SFTConfig``.
        packed: whether the data is packed: a batch is one row then, and positions tell where a sample begins.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.pad_id)  # trl's own choice may be in no vocabulary
    config = SFTConfig(**values, packing=packed, dataset_kwargs={"skip_prepare_dataset": True})
    # trl gives packed rows to a collator of its own alone.
    collator = None if packed else DataCollatorForLanguageModeling(pad_token_id=encoder.pad_id)
    return ChatTrainer(
        optimizer,
        model=model,
        args=config,
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


def refuse_packing(model: nn.Module) -> None:
    """Raise :class:`ConfigError` where packed samples would see each other."""
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if attention not in ISOLATES:
        raise ConfigError(
            f"--packing: this model's attention ({attention}) does not keep samples apart by their positions; leave "
            f"--packing out, or load it with one of {', '.join(ISOLATES)}"
        )

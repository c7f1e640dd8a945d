"""Direct preference optimisation (arXiv 2305.18290): answers that are preferred become likelier than others.

The reference is the model as it starts: with a new adapter that is the backbone, the adapter switched off. What it
makes of every answer is computed once, before the training, so that no second model is kept.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pyra.errors import ConfigError
from pyra.tasks.fitting.fit import Fitted
from pyra.tasks.language.models import load_decoder, load_tokenizer, read_config
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.thinking import thinking_switch
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.dpo_options import DpoOptions
from pyra.tasks.posttraining.preferences import KEYS, EncodedPair, KeptPairs, encode_pairs, read_pairs
from pyra.tasks.posttraining.rows import Row, read_rows
from pyra.tasks.posttraining.runs import continued, load_posttrained, new_start, read_posttraining_options, run_kind
from pyra.tasks.posttraining.scoring import cost_columns, score_answers
from pyra.tasks.posttraining.trainer import PostTrainer, fit_with
from pyra.tasks.posttraining.working import Score, carry_out, finished_run, told_of_rows, unread_keys
from pyra.tasks.results import RunResult
from pyra.tasks.training import ready, refuse_output_in_data

METRIC = "preference_accuracy"
LOGGED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"
)  # fmt: skip
Likelihoods = list[tuple[float, float]]
"""Of each pair, the log-likelihood of the chosen and of the rejected answer, in nats."""


class PreferenceTrainer(PostTrainer, DPOTrainer):
    """Modifications: those of :class:`PostTrainer`; data is encoded, and the reference computed, before it is made."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any, **__: Any) -> datasets.Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: datasets.Dataset, *_: Any, **__: Any) -> datasets.Dataset:
        return dataset


def train_dpo(options: DpoOptions) -> tuple[RunResult, list[str]]:
    """Train a decoder on preferences and write the run's folder; returns its row, and what is worth knowing.

    The score is the share of held-out pairs whose chosen answer has gained more than the rejected one, in
    log-likelihood against the reference. All that can be wrong with the input is found before the output folder is
    touched. With ``options.resume`` an interrupted run goes on from its newest complete checkpoint, and a finished one
    is left as it is. In a distributed run every process calls this.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone, the reference or the output folder.
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
    train, test = (encoded(part, subject) for part in (rows.train, rows.test))
    if options.reference is not None:
        refuse_other_words(options.reference, subject.encoder)
    left_out = train.left_out + test.left_out
    work = _Preferring(options, subject, train, test, device)
    result = carry_out(options, rows, subject, device, left_out, work)
    of_data = [*told_of_rows(rows, left_out, subject.max_length), *unread_keys(rows, KEYS)]
    return result, [*start.notes, *work.notes, *of_data]


def encoded(rows: Sequence[Row], subject: Subject) -> KeptPairs:
    """Turn rows into token ids; errors as of :func:`read_pairs` and :func:`encode_pairs`."""
    pairs = read_pairs(rows, thinking_switch(subject.encoder.tokenizer))
    return encode_pairs(pairs, subject.encoder, subject.max_length)


class _Preferring:
    """Trains on pairs, and scores those that were held out."""

    def __init__(
        self, options: DpoOptions, subject: Subject, train: KeptPairs, test: KeptPairs, device: torch.device
    ) -> None:
        self.options, self.subject, self.train, self.test, self.device = options, subject, train, test, device
        self.reference: Likelihoods = []
        self.notes: list[str] = []

    def fit(self, model: nn.Module, folder: Path) -> Fitted:
        """Ask the reference, and train."""
        start = replace(self.subject, model=model.to(self.device).eval())
        asked = start if self.options.reference is None else load_reference(self.options.reference, start)
        asked.model.to(self.device)
        said = f"{self.options.label}: reference"
        pairs = [*self.train.pairs, *self.test.pairs]
        known = likelihoods(asked, pairs, self.options, self.device, said)
        del asked
        gc.collect()
        own, self.reference = known[: len(self.train.pairs)], known[len(self.train.pairs) :]
        return fit(model, self.subject.encoder, self.train.pairs, own, self.options, folder, self.device)

    def score(self, subject: Subject) -> Score:
        """Score."""
        found = likelihoods(subject, self.test.pairs, self.options, self.device, f"{self.options.label}: test")
        beta = self.options.beta
        rewards = [
            (beta * (chosen - reference[0]), beta * (rejected - reference[1]))
            for (chosen, rejected), reference in zip(found, self.reference, strict=True)
        ]
        right = [chosen > rejected for chosen, rejected in rewards]
        value = sum(right) / len(right)
        told = {
            "accuracy": value,
            "pairs": len(right),
            "reward_chosen": sum(chosen for chosen, _ in rewards) / len(right),
            "reward_rejected": sum(rejected for _, rejected in rewards) / len(right),
        }
        told["margin"] = told["reward_chosen"] - told["reward_rejected"]
        error = 100 * math.sqrt(value * (1 - value) / len(right))
        self.notes = [
            f"held-out pairs: {sum(right)} of {len(right)} preferred (standard error {error:.1f} points); the chosen "
            f"answer's reward is {told['margin']:+.4f} above the rejected one's (both are 0 before the training)"
        ]
        columns = {
            "num_test": len(right),
            "train_tokens": sum(len(row.ids) - row.start for row in self.train.answers),
            **cost_columns(subject, self.test.answers),
        }
        written = {"rewards_chosen": [one for one, _ in rewards], "rewards_rejected": [other for _, other in rewards]}
        return Score(METRIC, value, True, columns, written, told)


def likelihoods(
    subject: Subject, pairs: Sequence[EncodedPair], options: DpoOptions, device: torch.device, said: str
) -> Likelihoods:
    """Return what a model makes of both answers of each pair; arguments as of :func:`score_answers`."""
    answers = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    nats = score_answers(subject, answers, options, device, said).nats
    return [(-chosen, -rejected) for chosen, rejected in zip(nats[::2], nats[1::2], strict=True)]


def refuse_other_words(reference: str, encoder: Encoder) -> None:
    """Raise :class:`ConfigError` where a reference has another vocabulary: its likelihoods would be of other tokens."""
    is_run = run_kind(Path(reference).expanduser()) is not None
    backbone = read_posttraining_options(reference).backbone if is_run else reference
    try:
        words = read_config(backbone).vocab_size
    except ConfigError as error:
        where = f"--reference {reference}" + (f" was made of {backbone}" if is_run else "")
        raise ConfigError(f"{where}: {str(error).removeprefix(f'--backbone {backbone!r}').lstrip(': ')}") from None
    other, own = load_tokenizer(backbone).get_vocab(), encoder.tokenizer.get_vocab()
    if other != own:
        differing = next(word for word in {**own, **other} if own.get(word) != other.get(word))
        raise ConfigError(
            f"--reference {reference} has another vocabulary ({len(other)} tokens, the backbone {len(own)}; such "
            f"as {differing!r}): give a model with the same tokenizer"
        )
    if max(own.values()) >= words:
        raise ConfigError(
            f"--reference {reference} has weights of {words} tokens, and its tokenizer tokens up to "
            f"{max(own.values())}: give a model with the same vocabulary"
        )


def load_reference(reference: str, start: Subject) -> Subject:
    """Load a model, or the model of a run folder, that asks in the words of another one."""
    if run_kind(Path(reference).expanduser()) is not None:
        return replace(start, model=load_posttrained(reference)[0].model)
    return replace(start, model=load_decoder(reference).eval().requires_grad_(False))


def fit(
    model: nn.Module,
    encoder: Encoder,
    pairs: Sequence[EncodedPair],
    reference: Likelihoods,
    options: DpoOptions,
    folder: Path,
    device: torch.device,
) -> Fitted:
    """Train an adapted model on pairs; errors as of :func:`pyra.tasks.posttraining.trainer.fit_with`.

    Args:
        model: adapted.
        encoder: whose tokenizer it was made with.
        pairs: to train on.
        reference: of each pair.
        options: of the run.
        folder: of the run.
        device: to train on.
    """
    data = training_data(pairs, reference)

    def make(optimizer: Callable[[], torch.optim.Optimizer], values: dict[str, Any]) -> PreferenceTrainer:
        return preference_trainer(model, encoder, data, optimizer, values, options)

    return fit_with(make, model, options, folder, device, len(data), LOGGED)


def training_data(pairs: Sequence[EncodedPair], reference: Likelihoods) -> datasets.Dataset:
    """Return pairs as trl takes them, with what the reference makes of them."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": pair.chosen.ids[: pair.chosen.start],
                "chosen_ids": pair.chosen.ids[pair.chosen.start :],
                "rejected_ids": pair.rejected.ids[pair.rejected.start :],
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            }
            for pair, (chosen, rejected) in zip(pairs, reference, strict=True)
        ]
    )


def preference_trainer(
    model: Any,
    encoder: Encoder,
    data: datasets.Dataset,
    optimizer: Callable[[], torch.optim.Optimizer],
    values: dict[str, Any],
    options: DpoOptions,
) -> PreferenceTrainer:
    """Return the trainer of an adapted model on data of :func:`training_data`."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.pad_id)
    config = DPOConfig(
        **values,
        beta=options.beta,
        loss_type=[options.loss],
        label_smoothing=options.label_smoothing,
        precompute_ref_log_probs=True,
    )
    return PreferenceTrainer(
        optimizer,
        # trl would copy the adapter of a PeftModel as its reference, which is computed already.
        model=model.get_base_model() if hasattr(model, "get_base_model") else model,
        args=config,
        train_dataset=data,
        data_collator=DataCollatorForPreference(pad_token_id=encoder.pad_id),
        processing_class=tokenizer,
    )

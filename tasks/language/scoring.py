"""Answers of a model: by its head, by the likelihood of words after a prompt, or by what it generates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pyra.errors import TrainingError
from pyra.tasks.language.answers import cut
from pyra.tasks.language.models import prompt_masks
from pyra.tasks.language.tokens import Answered, Encoder, by_length, mask, pad

_NO_NUMBER = "the model gives logits that are NaN or infinite: it cannot be scored"
_LOOK_BACK = 24  # tokens that are searched for a text that ends an answer: longer than any such text


def classify(
    model: nn.Module,
    rows: Sequence[dict[str, list[int]]],
    *,
    pad_id: int,
    batch_size: int,
    description: str = "scoring",
) -> list[int]:
    """Return the label that a classification head gives each row.

    Args:
        model: with a head, in evaluation mode; token ids [B, T] to logits [B, labels].
        rows: ``input_ids`` and what else the tokenizer gives.
        pad_id: fills batches.
        batch_size: rows a forward.
        description: label of the progress bar.

    Raises:
        TrainingError: where a logit is NaN or infinite.
    """
    found = [0] * len(rows)
    device = next(model.parameters()).device
    batches = list(by_length([len(row["input_ids"]) for row in rows], batch_size))
    with torch.inference_mode():
        for indices in tqdm(batches, desc=description, unit="batch", leave=False, disable=None):
            batch = collate([rows[index] for index in indices], pad_id)
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
            if not logits.isfinite().all():
                raise TrainingError(_NO_NUMBER)
            for index, label in zip(indices, logits.argmax(-1).tolist(), strict=True):
                found[index] = label
    return found


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad encoded rows at their right, with the attention mask."""
    batch = {name: pad([row[name] for row in rows], pad_id if name == "input_ids" else 0) for name in rows[0]}
    return {**batch, "attention_mask": mask([row["input_ids"] for row in rows])}


def log_likelihoods(
    model: nn.Module, rows: Sequence[Answered], *, pad_id: int, batch_size: int, description: str = "scoring"
) -> list[float]:
    """Return the log-likelihood of each answer after its prompt: the sum over its tokens, natural logarithm.

    Rows are padded at their right: no token of a causal model sees what comes after it, and positions count from the
    first token, so that a batch changes nothing. Answers that differ in their last token alone share a forward.

    Args:
        model: causal, in evaluation mode; token ids [B, T] to logits [B, T, V].
        rows: prompts with their answers; an answer has one token at least, and one token stands before it.
        pad_id: fills batches.
        batch_size: rows a forward.
        description: label of the progress bar.

    Raises:
        TrainingError: where a logit of an answer is NaN or infinite.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        inputs.setdefault(tuple(row.ids[:-1]), []).append(number)
    unique = list(inputs)
    device = next(model.parameters()).device
    kept = "logits_to_keep" in inspect.signature(model.forward).parameters
    found = [0.0] * len(rows)
    batches = list(by_length([len(ids) for ids in unique], batch_size))
    with torch.inference_mode():
        for indices in tqdm(batches, desc=description, unit="batch", leave=False, disable=None):
            ids = [unique[index] for index in indices]
            width = len(ids[0])  # the longest comes first
            first = min(rows[number].start - 1 for row in ids for number in inputs[row])
            options = {"logits_to_keep": width - first} if kept else {}
            batch = {"input_ids": pad(ids, pad_id).to(device), "attention_mask": mask(ids).to(device)}
            starts = [min(rows[number].start for number in inputs[row]) for row in ids]
            batch |= prompt_masks(model, batch["input_ids"], starts)
            logits = model(**batch, **options, use_cache=False).logits
            missing = width - logits.shape[1]  # positions whose logits were not computed
            for place, asked in enumerate(ids):
                for number in inputs[asked]:
                    found[number] = _answer(logits[place], rows[number], missing)
    return found


def _answer(logits: Tensor, row: Answered, missing: int) -> float:
    """Sum the log-probabilities of an answer: the logits at a position are about the token after it."""
    needed = logits[row.start - 1 - missing : len(row.ids) - 1 - missing].float()
    if not needed.isfinite().all():
        raise TrainingError(_NO_NUMBER)
    targets = torch.tensor(row.ids[row.start :], device=logits.device)
    return float(needed.log_softmax(-1).gather(-1, targets[:, None]).double().sum())


class AnswerNll(NamedTuple):
    """Negative log-likelihood of an answer in nats, and the tokens that it has."""

    nats: float
    tokens: int


def answer_nll(
    model: nn.Module, rows: Sequence[Answered], *, pad_id: int, batch_size: int, description: str = "answers"
) -> list[AnswerNll]:
    """Return how unlikely each answer is after its prompt; arguments and errors as of :func:`log_likelihoods`."""
    found = log_likelihoods(model, rows, pad_id=pad_id, batch_size=batch_size, description=description)
    return [AnswerNll(-value, len(row.ids) - row.start) for value, row in zip(found, rows, strict=True)]


def mean_nll(answers: Sequence[AnswerNll | None]) -> float | None:
    """Return nats a token over all tokens of all answers: a long answer counts more; None where there is none.

    >>> mean_nll([AnswerNll(6.0, 2), None, AnswerNll(1.0, 3)])
    1.4
    """
    known = [answer for answer in answers if answer is not None]
    return sum(answer.nats for answer in known) / sum(answer.tokens for answer in known) if known else None


class Said(NamedTuple):
    """What a model answered, without its thoughts, and the tokens that it generated for it, thoughts included."""

    text: str
    tokens: int


class _Stopped(StoppingCriteria):
    """Modifications: a row is done when its newest tokens hold one of the texts that end an answer.

    Of a model that thinks, all that it has said is looked at: a thought does not end an answer.
    """

    def __init__(self, encoder: Encoder, stop: Sequence[str], begun: Sequence[str], start: int) -> None:
        self.encoder, self.stop, self.begun, self.start = encoder, stop, begun, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        back = _LOOK_BACK if self.encoder.marks is None else input_ids.shape[1]
        newest = input_ids[:, max(self.start, input_ids.shape[1] - back) :].tolist()
        # White space before an answer is no end of it.
        texts = [self.encoder.spoken(row, begun).lstrip() for row, begun in zip(newest, self.begun, strict=True)]
        done = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    encoder: Encoder,
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int,
    batch_size: int,
    description: str = "generating",
) -> list[Said]:
    """Return what a decoder says after each prompt: greedy, in batches padded at their left.

    Args:
        model: causal, in evaluation mode.
        prompts: token ids of each.
        encoder: whose tokenizer the model was made with.
        stop: texts that end an answer; they and what follows are left out.
        max_new_tokens: at most, for each.
        batch_size: prompts at once.
        description: label of the progress bar.
    """
    causal: Any = model
    # Whatever else the model's own generation configuration asks for (sampling, penalties) is not greedy.
    own = causal.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else (encoder.end or None)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=encoder.pad_id, eos_token_id=ends
    )
    found = [Said("", 0)] * len(prompts)
    device = next(model.parameters()).device
    causal.generation_config = greedy
    try:
        for indices in tqdm(
            list(by_length(list(map(len, prompts)), batch_size)),
            desc=description,
            unit="batch",
            leave=False,
            disable=None,
        ):
            rows = [prompts[index] for index in indices]
            width = len(rows[0])
            begun = [encoder.begun(row) for row in rows]
            criteria = StoppingCriteriaList([_Stopped(encoder, stop, begun, width)] if stop else [])
            with torch.inference_mode():
                ids = causal.generate(
                    input_ids=pad(rows, encoder.pad_id, left=True).to(device),
                    attention_mask=mask(rows, left=True).to(device),
                    generation_config=greedy,
                    stopping_criteria=criteria,
                )
            for index, row, start in zip(indices, ids[:, width:].tolist(), begun, strict=True):
                said = _until(row, ends)
                found[index] = Said(cut(encoder.spoken(said, start).lstrip(), stop), len(said))
    finally:
        causal.generation_config = own
    return found


def _until(row: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """Return the tokens before the first that ends a text: what follows is padding."""
    marks = {ends} if isinstance(ends, int) else set(ends or ())
    return next((row[:place] for place, token in enumerate(row) if token in marks), row)

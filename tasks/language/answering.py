"""A model asked all examples of a split, and what its answers are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyra.errors import ConfigError
from pyra.tasks.fitting import processes
from pyra.tasks.language.answers import RULES
from pyra.tasks.language.data import Example, TextTask
from pyra.tasks.language.models import count_macs, count_plain_macs, precision
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.scored import Scored
from pyra.tasks.language.scoring import AnswerNll, answer_nll, classify, generate
from pyra.tasks.language.tokens import Answered
from pyra.tasks.metrics import load_metric


@dataclass(frozen=True)
class Asking:
    """How examples are put to a model.

    Attributes:
        batch_size: examples a forward.
        dtype: autocast precision.
        max_new_tokens: generated at most.
        shown: answered examples before each prompt.
        label: of progress bars.
    """

    batch_size: int
    dtype: torch.dtype = torch.float32
    max_new_tokens: int = 256
    shown: str = ""
    label: str = "scoring"


def answer(subject: Subject, task: TextTask, examples: Sequence[Example], how: Asking) -> Scored:
    """Put examples to a model, and score what it answers.

    In a distributed run every process asks for its share and gets the answers of all, each example's once.

    Raises:
        ConfigError: where nothing is left of the prompts beside what is to be generated.
        TrainingError: where logits are NaN or infinite.
    """
    start = time.perf_counter()
    positions = processes.share(len(examples))
    own_examples = [examples[position] for position in positions]
    asked = {"head": _by_head, "scoring": _by_likelihood, "generation": _by_generation}[subject.answer]
    with precision(subject.model, how.dtype):
        found: list[_Answer] = _of_all(positions, asked(subject, task, own_examples, how))
    seconds = time.perf_counter() - start
    nlls = [one.nll for one in found]
    if subject.answer == "generation":  # after the clock has stopped: it is no part of answering
        with precision(subject.model, how.dtype):
            nlls = _of_all(positions, _right_answers(subject, own_examples, how))
    given = [one.given for one in found]
    texts = [one.text for one in found if one.text is not None]
    tokens = round(sum(one.length for one in found) / len(found))
    labels = bool(task.labels)
    right: Any = [example.label if labels else example.reference for example in examples]
    metric = task.card.metric
    value = float(load_metric(metric).compute(predictions=given, references=right)[metric])
    cut = sum(one.cut for one in found)
    macs, plain = count_macs(subject.model, tokens), count_plain_macs(subject.model, tokens)
    known = None if subject.answer == "head" else nlls
    generated = [one.tokens for one in found if one.tokens is not None]
    return Scored(value, right, given, texts or None, cut, seconds, macs, plain, known, generated or None)


def _of_all(positions: Sequence[int], own: Sequence[Any]) -> list[Any]:
    """Return what all processes found, each example's once and in order."""
    shares = processes.gathered(dict(zip(positions, own, strict=True)))
    found = {position: one for share in shares for position, one in share.items()}
    return [found[position] for position in sorted(found)]


@dataclass(frozen=True)
class _Answer:
    """What was answered, what was generated where it was, the tokens that were read, and whether some were not.

    ``nll`` is that of the right answer, where answering has told it; ``tokens`` were generated.
    """

    given: Any
    text: str | None
    length: int
    cut: bool
    nll: AnswerNll | None = None
    tokens: int | None = None


def _by_head(subject: Subject, task: TextTask, examples: Sequence[Example], how: Asking) -> list[_Answer]:
    rows = [subject.encoder.texts(example.texts, subject.max_length) for example in examples]
    lengths = [len(row["input_ids"]) for row in rows]
    cut = [  # only what fills the length may have been longer
        length == subject.max_length and len(subject.encoder.texts(example.texts, 2**30)["input_ids"]) > length
        for example, length in zip(examples, lengths, strict=True)
    ]
    pad_id = subject.encoder.pad_id
    found = classify(subject.model, rows, pad_id=pad_id, batch_size=how.batch_size, description=how.label)
    return [_Answer(*one) for one in zip(found, [None] * len(found), lengths, cut, strict=True)]


def _by_likelihood(subject: Subject, task: TextTask, examples: Sequence[Example], how: Asking) -> list[_Answer]:
    words = task.card.words
    whole = [row for e in examples for row in subject.encoder.answered(how.shown + e.prompt, words)]
    rows = [_shortened(row, subject.max_length) for row in whole]
    pad_id = subject.encoder.pad_id
    found = answer_nll(subject.model, rows, pad_id=pad_id, batch_size=how.batch_size, description=how.label)
    grouped = torch.tensor([-one.nats for one in found], dtype=torch.float64).view(-1, len(words))
    made = []
    for place, label in enumerate(grouped.argmax(-1).tolist()):
        asked = slice(place * len(words), (place + 1) * len(words))
        cut = any(len(row.ids) > subject.max_length for row in whole[asked])
        right = found[place * len(words) + examples[place].label]
        made.append(_Answer(label, None, max(len(row.ids) for row in rows[asked]), cut, right))
    return made


def _shortened(row: Answered, length: int) -> Answered:
    """Cut a prompt at its beginning, so that its end and the answer are read."""
    surplus = max(len(row.ids) - length, 0)
    if surplus >= row.start:
        raise ConfigError(f"--max-length {length} leaves nothing of a prompt before an answer: raise it")
    return Answered(row.ids[surplus:], row.start - surplus)


def _by_generation(subject: Subject, task: TextTask, examples: Sequence[Example], how: Asking) -> list[_Answer]:
    room = room_for_prompts(subject, how.max_new_tokens)
    whole = [subject.encoder.prompt(how.shown + example.prompt) for example in examples]
    prompts = [ids[-room:] for ids in whole]
    said = generate(
        subject.model,
        prompts,
        subject.encoder,
        stop=task.card.stop,
        max_new_tokens=how.max_new_tokens,
        batch_size=how.batch_size,
        description=how.label,
    )
    read = [RULES[task.card.extract](one.text) or "" for one in said]
    found: Any = [_label(text, task.card.words) for text in read] if task.labels else read
    cut = [len(ids) > room for ids in whole]
    return [
        _Answer(given, one.text, len(ids), was_cut, tokens=one.tokens)
        for given, one, ids, was_cut in zip(found, said, prompts, cut, strict=True)
    ]


def room_for_prompts(subject: Subject, max_new_tokens: int) -> int:
    """Return the tokens that a prompt may have: what the model reads, less what it is to say.

    Raises:
        ConfigError: where nothing is left.
    """
    known = _positions(subject)
    room = min(subject.max_length, known - max_new_tokens)
    if room < 1:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the backbone reads {known} tokens"
        )
    return room


def _right_answers(subject: Subject, examples: Sequence[Example], how: Asking) -> list[AnswerNll | None]:
    """Score the right answers after the prompts as a generated one would follow them."""
    room, most = room_for_prompts(subject, how.max_new_tokens), _positions(subject)
    rows = {}
    for place, example in enumerate(examples):
        (row,) = subject.encoder.answered(how.shown + example.prompt, [example.answer])
        surplus = max(row.start - room, len(row.ids) - most, 0)
        if surplus < row.start:
            rows[place] = Answered(row.ids[surplus:], row.start - surplus)
    pad_id, label = subject.encoder.pad_id, f"{how.label}, right answers"
    scored = answer_nll(subject.model, list(rows.values()), pad_id=pad_id, batch_size=how.batch_size, description=label)
    found = dict(zip(rows, scored, strict=True))
    return [found.get(place) for place in range(len(examples))]


def _positions(subject: Subject) -> int:
    """Return how many tokens the model reads."""
    return getattr(getattr(subject.model, "config", None), "max_position_embeddings", None) or 2**30


def _label(text: str, words: Sequence[str]) -> int:
    """Return the label whose words an answer is, whatever its case and the stop behind it; -1 for none."""
    said = text.strip(" .!\"'*").casefold()
    return next((label for label, word in enumerate(words) if word.casefold() == said), -1)

"""Questions whose answers can be verified: from rows of data, or made up; encoded, answered and marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyra.errors import ConfigError
from pyra.tasks.fitting import processes
from pyra.tasks.language.models import precision
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.scoring import Said, generate
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.arithmetic import Problem, arithmetic_problems
from pyra.tasks.posttraining.chat import COMMON, as_messages, each, needed
from pyra.tasks.posttraining.rewards import same_answers
from pyra.tasks.posttraining.rl_options import RlOptions
from pyra.tasks.posttraining.rows import Row, Rows, read_rows
from pyra.tasks.runs import DTYPES

KEYS = ("prompt", "answer")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """What is asked, and the right answer.

    Attributes:
        messages: turns; the assistant is to go on.
        answer: that :func:`pyra.tasks.posttraining.rewards.same_answers` compares with.
        ids: of the prompt.
    """

    messages: tuple[Message, ...]
    answer: str
    ids: list[int]


def question_rows(options: RlOptions) -> Rows:
    """Read the rows of a run, or make them up.

    Raises:
        DataError, ConfigError: where there are none, or too few.
    """
    if options.task is None:
        return read_rows(options.data, options.held_out, options.limit)
    train, test = arithmetic_problems(options.arithmetic(), options.problems, options.test_problems)
    limit = options.limit
    return Rows("arithmetic", "arithmetic", _rows(train[:limit], "problem"), _rows(test[:limit], "test problem"))


def _rows(problems: Sequence[Problem], name: str) -> list[Row]:
    return [
        Row({"prompt": one.prompt, "answer": one.answer}, f"{name} {place}") for place, one in enumerate(problems, 1)
    ]


def encode_questions(rows: Sequence[Row], encoder: Encoder, room: int) -> list[Question]:
    """Turn rows into questions; those whose prompt is longer than ``room`` tokens are left out.

    A row has ``prompt`` (text, or messages that end with the user's) and ``answer`` (a text or a number).

    Raises:
        DataError: naming the first rows that are none.
        ConfigError: where all prompts are longer.
    """
    found = each(rows, lambda row: _question(row, encoder))
    kept = [question for question in found if len(question.ids) <= room]
    if not kept:
        raise ConfigError(
            f"every prompt is longer than {room} tokens, which --max-length less --max-new-tokens leaves: raise the "
            "one, where the backbone reads more, or lower the other"
        )
    return kept


def refuse_few(questions: Sequence[Question], options: RlOptions) -> None:
    """Raise :class:`ConfigError` for fewer questions than a rollout has."""
    prompts = options.batch_size // options.group
    if len(questions) < prompts:
        raise ConfigError(
            f"a rollout has {prompts} prompts (--batch-size {options.batch_size} in groups of {options.group}), and "
            f"there are {len(questions)} to train on: lower --batch-size or raise --group"
        )


def _question(row: Row, encoder: Encoder) -> Question:
    """Return the question of a row; raises ``ValueError`` in words where it is none."""
    if given := [key for key in COMMON if row.values.get(key) is not None]:
        raise ValueError(f"{given[0]} of a row is not read here: say it for all, with --{given[0].replace('_', '-')}")
    asked, answer = needed(row.values, KEYS)
    prompt = [{name: turn[name] for name in ("role", "content")} for turn in as_messages(asked, "prompt", "user")]
    if prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's turn, which is to be answered")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f"answer must be the right answer, a text or a number; found {answer!r}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"answer is {answer}, which nothing is equal to")
    text = encoder.chat_text(prompt, asks=True)
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Question(tuple(prompt), str(answer), list(ids))


@dataclass(frozen=True)
class Marked:
    """What a model answered, greedily, the tokens that took, and whether it is right."""

    texts: list[str]
    tokens: list[int]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)


def answer_questions(subject: Subject, questions: Sequence[Question], options: RlOptions, said: str) -> Marked:
    """Answer questions greedily and mark the answers; every process answers a share, and gets all.

    Args:
        subject: the model on its device, in evaluation mode.
        questions: at least one.
        options: of the run.
        said: what the progress bar says.
    """
    positions = processes.share(len(questions))
    with torch.no_grad(), precision(subject.model, DTYPES[options.dtype]):
        own = generate(
            subject.model,
            [questions[place].ids for place in positions],
            subject.encoder,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            description=said,
        )
    found: dict[int, Said] = {}
    for share in processes.gathered(dict(zip(positions, own, strict=True))):
        found |= share
    texts = [found[place].text for place in range(len(questions))]
    tokens = [found[place].tokens for place in range(len(questions))]
    return Marked(texts, tokens, same_answers(texts, [question.answer for question in questions]))

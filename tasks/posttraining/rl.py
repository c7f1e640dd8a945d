"""Reinforcement learning on rewards that can be verified: rollouts, several updates on each, curves and a score."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from pyra.errors import ConfigError
from pyra.tasks.fitting import processes
from pyra.tasks.fitting.fit import Fitted
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.tokens import Answered
from pyra.tasks.posttraining.questions import (
    KEYS,
    Question,
    answer_questions,
    encode_questions,
    question_rows,
    refuse_few,
)
from pyra.tasks.posttraining.rewards import Guarded, answer_reward, form_reward, length_reward
from pyra.tasks.posttraining.rl_options import RlOptions
from pyra.tasks.posttraining.rl_trainer import CURVES, REFERENCE, Entry, curves_of, rollout_trainer
from pyra.tasks.posttraining.runs import continued, new_start
from pyra.tasks.posttraining.scoring import cost_columns
from pyra.tasks.posttraining.trainer import PostTrainer, fit_with
from pyra.tasks.posttraining.working import Score, carry_out, finished_run, told_of_rows, unread_keys
from pyra.tasks.reports.curves import Panel, draw_curves
from pyra.tasks.results import RunResult
from pyra.tasks.training import ready, refuse_output_in_data

METRIC = "exact_match"
PICTURE = "curves.png"
_FIRST = 5  # rollouts at either end that a summary is of

Reward = Callable[..., Sequence[float | None]]


def train_rl(
    options: RlOptions, rewards: Mapping[str, Reward] | None = None
) -> tuple[RunResult, list[str], list[Entry]]:
    """Train a decoder on rewards and write the run's folder.

    The score is the share of held-out questions that are answered right, greedily, by the trained model; that of the
    adapted model before the training is kept beside it. All that can be wrong with the input is found before the output
    folder is touched. With ``options.resume`` an interrupted run goes on from its newest complete checkpoint, which is
    at the end of a rollout, and a finished one is left as it is. In a distributed run every process calls this.

    Args:
        options: of the run.
        rewards: reward functions by name in place of ``options.rewards``; see :mod:`pyra.tasks.posttraining.rewards`.

    Returns:
        The row of the run, what is worth knowing, and its curves.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    device = ready(options)
    logging.getLogger("trl").setLevel(logging.ERROR)
    if options.data.strip():
        refuse_output_in_data(options)
    options = continued(options)
    rows = question_rows(options)
    if (earlier := finished_run(options, rows)) is not None:
        return earlier, [], []
    start = new_start(options)
    room = start.subject.max_length - options.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens} leaves no room for prompts in the {start.subject.max_length} "
            "tokens of --max-length, or that the backbone reads: lower it"
        )
    train, test = (encode_questions(part, start.subject.encoder, room) for part in (rows.train, rows.test))
    refuse_few(train, options)
    left_out = len(rows.train) + len(rows.test) - len(train) - len(test)
    guarded = [Guarded(reward, name, _warn) for name, reward in (rewards or rewards_of(options)).items()]
    work = _Rewarded(options, start.subject, train, test, guarded, device)
    result = carry_out(options, rows, start.subject, device, left_out, work)
    notes = [*start.notes, *told_of_rows(rows, left_out, room)]
    notes += [
        f"reward {name}: no number for {failed} of {samples} answers"
        for name, failed, samples in _marked(guarded)
        if failed
    ]
    notes += unread_keys(rows, KEYS) if options.task is None else []
    alike = [one["groups_alike"] for one in work.curves if "groups_alike" in one]
    flat = sum(share == 1 for share in alike)
    if 2 * flat > len(alike) > flat:
        notes.append(
            f"in {flat} of {len(alike)} rollouts all answers to a prompt were rewarded alike: they taught nothing"
        )
    if alike and min(alike) == 1:
        notes.append(
            "nothing was learnt: answers to one prompt were never rewarded differently; try easier problems, a reward "
            "that more answers earn (--rewards answer,form), or a larger --group"
        )
    return result, notes, work.curves


def rewards_of(options: RlOptions) -> dict[str, Reward]:
    """Return the reward functions that the options name."""
    known: dict[str, Reward] = {
        "answer": answer_reward,
        "form": form_reward(options.form),
        "length": length_reward(max(options.max_new_tokens // 2, 1)),
    }
    return {name: known[name] for name in options.rewards}


def fit_policy(
    model: nn.Module,
    subject: Subject,
    questions: Sequence[Question],
    rewards: Sequence[Guarded],
    options: RlOptions,
    folder: Path,
    device: torch.device,
) -> Fitted:
    """Train an adapted model on rollouts; its ``losses`` hold the curves, under the names of ``CURVES``.

    Args:
        model: adapted.
        subject: whose encoder is used.
        questions: to train on.
        rewards: added up.
        options: of the run.
        folder: of the run.
        device: to train on.

    Raises:
        ConfigError: for what cannot be trained so.
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """

    def make(optimizer: Callable[[], torch.optim.Optimizer], values: dict[str, Any]) -> PostTrainer:
        return rollout_trainer(model, subject.encoder, questions, rewards, optimizer, options, values)

    logged = [*CURVES, *(f"rewards/{one.__name__}/failed" for one in rewards)]
    fitted = fit_with(make, model, options, folder, device, len(questions), logged)
    if REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE)  # type: ignore[operator]
    return dataclasses.replace(fitted, losses=curves_of(fitted.losses))


class _Rewarded:
    """Trains on rewards, and marks the answers to held-out questions before and after."""

    def __init__(
        self,
        options: RlOptions,
        subject: Subject,
        train: Sequence[Question],
        test: Sequence[Question],
        rewards: Sequence[Guarded],
        device: torch.device,
    ) -> None:
        self.options, self.subject, self.train, self.test = options, subject, train, test
        self.rewards, self.device = rewards, device
        self.before: float | None = None
        self.curves: list[Entry] = []

    def fit(self, model: nn.Module, folder: Path) -> Fitted:
        """Train, and draw how it went."""
        start = dataclasses.replace(self.subject, model=model.to(self.device).eval())
        self.before = answer_questions(start, self.test, self.options, f"{self.options.label}: before").accuracy
        fitted = fit_policy(model, self.subject, self.train, self.rewards, self.options, folder, self.device)
        self.curves = fitted.losses
        processes.on_main(lambda: draw_curves(folder / PICTURE, panels({self.options.algorithm: [self.curves]})))
        return fitted

    def score(self, subject: Subject) -> Score:
        """Score."""
        marked = answer_questions(subject, self.test, self.options, f"{self.options.label}: after")
        asked = [Answered(question.ids, len(question.ids)) for question in self.test]
        columns = {
            **cost_columns(subject, asked),
            "num_test": len(self.test),
            "value_before": self.before,
            "answer_tokens": fmean(marked.tokens),
        }
        answers = {
            "labels": [one.answer for one in self.test],
            "predictions": marked.texts,
            "generated_tokens": marked.tokens,
            "right": marked.right,
        }
        told = {"accuracy_before": self.before, "accuracy": marked.accuracy, "questions": len(self.test)}
        return Score(METRIC, marked.accuracy, True, columns, answers, told)


def panels(curves: Mapping[str, Sequence[Sequence[Entry]]]) -> list[Panel]:
    """Return what is drawn of runs: by name, the curves of each seed."""
    wanted = {
        "reward": "reward of a rollout",
        "entropy": "entropy, nats a token",
        "length": "tokens of an answer",
        "clipped": "tokens clipped (gspo: answers)",
        "trajectories_rolling_back": "answers rolling back",
        "trajectories_zeroed": "answers beyond their budget",
        "groups_rolling_back": "prompts rolling back",
        "groups_zeroed": "prompts beyond their budget",
    }
    found = []
    for name, title in wanted.items():
        lines = {
            label: [[(one["step"], one[name]) for one in run if name in one] for run in runs]
            for label, runs in curves.items()
        }
        lines = {label: runs for label, runs in lines.items() if any(runs)}
        if lines:
            found.append(Panel(title, "step", lines))
    return found


def summary_of(curves: Sequence[Entry]) -> dict[str, float]:
    """Return means over the first and last rollouts of a run, and shares of what was held back, over all steps."""
    found: dict[str, float] = {}
    for name in ("reward", "length", "entropy"):
        values = [one[name] for one in curves if name in one and "reward" in one]
        if values:
            found |= {f"first_{name}": fmean(values[:_FIRST]), f"last_{name}": fmean(values[-_FIRST:])}
    for name in ("clipped", "trajectories_passing", "trajectories_rolling_back", "trajectories_zeroed"):
        values = [one[name] for one in curves if name in one]
        if values:
            found[name] = fmean(values)
    return found


def _marked(rewards: Sequence[Guarded]) -> list[tuple[str, int, int]]:
    """Return name, marked and scored samples of each reward, of all processes."""
    shares = processes.gathered([(one.failed, one.samples) for one in rewards])
    return [
        (one.__name__, sum(failed for failed, _ in counts), sum(samples for _, samples in counts))
        for one, *counts in zip(rewards, *shares, strict=True)
    ]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)

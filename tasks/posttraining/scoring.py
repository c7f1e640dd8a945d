"""What a decoder makes of answers that it was not trained on, shared out among the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyra.backbones import macs, wrapped_schedule
from pyra.tasks.fitting import processes
from pyra.tasks.language.answer_loss import AnswerLoss
from pyra.tasks.language.models import count_macs, count_plain_macs, precision
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.scoring import answer_nll
from pyra.tasks.language.tokens import Answered
from pyra.tasks.posttraining.options import PostTrainingOptions
from pyra.tasks.runs import DTYPES


def score_answers(
    subject: Subject, rows: Sequence[Answered], options: PostTrainingOptions, device: torch.device, said: str
) -> AnswerLoss:
    """Return the negative log-likelihood of each answer; every process takes a share, and gets all.

    Args:
        subject: the model, in evaluation mode.
        rows: prompts with answers.
        options: of the run.
        device: that the model is on.
        said: what the progress bar says.

    Raises:
        TrainingError: where a logit is NaN or infinite.
    """
    positions = processes.share(len(rows))
    with precision(subject.model, DTYPES[options.dtype]):
        own = answer_nll(
            subject.model,
            [rows[place] for place in positions],
            pad_id=subject.encoder.pad_id,
            batch_size=options.batch_size,
            description=said,
        )
    found: dict[int, Any] = {}
    for share in processes.gathered(dict(zip(positions, own, strict=True))):
        found |= share
    nlls = [found[place] for place in range(len(rows))]
    return AnswerLoss([one.nats for one in nlls], [one.tokens for one in nlls])


def cost_columns(subject: Subject, rows: Sequence[Answered]) -> dict[str, Any]:
    """Return the columns of a result that say what a forward costs.

    MACs are those of one forward over an example of average length, prompt and answer. Rate and schedule are those of a
    prompt of 1024 tokens: shorter ones save less.
    """
    tokens = round(sum(len(row.ids) for row in rows) / len(rows))
    layers = int(getattr(getattr(subject.model, "config", None), "num_hidden_layers", 0))
    schedule = wrapped_schedule(subject.model) or [0] * layers
    saved = 1 - macs(subject.model) / macs(subject.model, [0] * layers) if any(schedule) else 0.0
    return {
        "macs": count_macs(subject.model, tokens),
        "plain_macs": count_plain_macs(subject.model, tokens),
        "schedule": schedule,
        "rate": round(saved, 4),
    }

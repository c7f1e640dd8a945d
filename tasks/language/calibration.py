"""What experts are scored on and models compared by: the prompts of a task with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.experts import only_experts
from pyra.tasks.language.answer_loss import AnswerLoss, answer_loss, answer_rows
from pyra.tasks.language.compression import Variant, costs
from pyra.tasks.language.data import TextTask, examples_digest
from pyra.tasks.language.tokens import Answered, Encoder, by_length, mask, pad


@dataclass(frozen=True)
class Rows:
    """Encoded examples of a split, and what the record says of them."""

    rows: list[Answered]
    told: dict[str, Any]


def encoded(task: TextTask, encoder: Encoder, split: str, limit: int | None, length: int) -> Rows:
    """Encode the examples of a split with their answers.

    Raises:
        DataError: for a split that is not there.
        ConfigError: where all examples are longer than what is read.
    """
    rows, examples, left_out = answer_rows(encoder, task.split(split, limit), length)
    tokens = sum(len(row.ids) for row in rows)
    told = {"split": split, "examples": len(rows), "tokens": tokens, "left_out": left_out}
    return Rows(rows, {**told, "sha256": examples_digest(examples)})


def batches(rows: Sequence[Answered], encoder: Encoder, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield what a model reads to have its experts scored: prompts and answers, padded at their right."""
    indices = list(by_length([len(row.ids) for row in rows], size))
    for batch in tqdm(indices, desc="scoring experts", unit="batch", leave=False, disable=None):
        ids = [rows[index].ids for index in batch]
        yield {
            "input_ids": pad(ids, encoder.pad_id).to(device),
            "attention_mask": mask(ids).to(device),
            "use_cache": False,
            "logits_to_keep": 1,
        }


class Losses:
    """Measures variants of a model on the same answers; the first is what the others are compared with."""

    def __init__(self, model: JoyAIForCausalLM, rows: Sequence[Answered], encoder: Encoder, batch_size: int) -> None:
        self.model, self.rows, self.encoder, self.batch_size = model, rows, encoder, batch_size
        self.first: AnswerLoss | None = None

    def variant(self, name: str, experts: int, active: int) -> Variant:
        """Measure the model as it is now, and say what it costs with so many experts and active ones."""
        loss = answer_loss(
            self.model, self.rows, self.encoder, batch_size=self.batch_size, description=f"answers: {name}"
        )
        told: dict[str, Any] = costs(self.model, experts, active)
        if self.first is None:
            self.first = loss
        else:
            told["difference"], told["error"] = loss.difference(self.first)
        return Variant(name=name, experts=experts, active=active, nll=loss.mean, **told)

    def masked(self, name: str, kept: Tensor | None = None, active: int | None = None) -> Variant:
        """Measure the model as if it had only some of its experts."""
        config = self.model.config
        with only_experts(self.model, kept, active):
            experts = config.n_routed_experts if kept is None else kept.shape[1]
            return self.variant(name, experts, config.num_experts_per_tok)

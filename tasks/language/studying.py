"""Choices of experts side by side on one model: by score, by the score of another task, and controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyra.backbones.joyai_checkpoint import check_checkpoint, check_tokenizer, load_model
from pyra.experts import ExpertScores, choose_experts, score_experts
from pyra.tasks.language.calibration import Losses, batches, encoded
from pyra.tasks.language.compress_options import CompressOptions, kept_number
from pyra.tasks.language.compression import Variant
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.models import load_encoder, longest
from pyra.tasks.runs import resolve_device


@dataclass
class ExpertStudy:
    """A model with its experts scored on a task.

    Attributes:
        options: what it was made with.
        losses: measures the model.
        scores: of the task's training text.
        calibration: what the record says of that text.
        test: of the test examples.
        length: tokens of an example at most.
    """

    options: CompressOptions
    losses: Losses
    scores: ExpertScores
    calibration: dict[str, Any]
    test: dict[str, Any]
    length: int = field(repr=False)

    @classmethod
    def of(
        cls,
        backbone: str,
        task: str,
        root: str | None,
        data: str | None,
        limit: int | None,
        batch_size: int,
        device: str = "auto",
    ) -> ExpertStudy:
        """Load a checkpoint and score its experts; arguments and errors as of ``pyra compress-experts``."""
        options = CompressOptions(
            backbone=backbone, task=task, root=root, data=data, limit=limit, batch_size=batch_size, device=device
        )
        place = resolve_device(device)
        config = check_checkpoint(backbone).config
        texts = load_text_task(task, root, data)
        encoder = load_encoder(backbone)
        check_tokenizer(encoder.tokenizer, config)
        length = longest(backbone, config, encoder.tokenizer, None)
        train, test = (encoded(texts, encoder, split, limit, length) for split in ("train", "test"))
        model = load_model(backbone).to(place).eval().requires_grad_(False)
        scores = score_experts(model, batches(train.rows, encoder, batch_size, place))
        losses = Losses(model, test.rows, encoder, batch_size)
        return cls(options, losses, scores, train.told, test.told, length)

    def scored_on(self, task: str) -> ExpertScores:
        """Score the experts on the training text of another task."""
        texts = load_text_task(task, self.options.root)
        rows = encoded(texts, self.losses.encoder, "train", self.options.limit, self.length).rows
        device = self.losses.model.device
        return score_experts(self.losses.model, batches(rows, self.losses.encoder, self.options.batch_size, device))

    def number(self, keep: float) -> int:
        """Return the experts that a share is; raises :class:`ConfigError` for one that does not fit."""
        options = CompressOptions(backbone=self.options.backbone, keep=keep)
        return kept_number(options, self.losses.model.config)

    def row(self, name: str, kept: Tensor | None = None, active: int | None = None) -> Variant:
        """Measure a choice."""
        return self.losses.masked(name, kept, active)

    def best(self, number: int, method: str, scores: ExpertScores | None = None) -> Tensor:
        """Choose by score."""
        return choose_experts(scores or self.scores, number, method, self._groups)

    def worst(self, number: int) -> Tensor:
        """Choose the experts with the lowest saliency."""
        scores = self.scores
        return choose_experts(
            ExpertScores(scores.layers, -scores.tokens, -scores.saliency), number, "reap", self._groups
        )

    def first(self, number: int) -> Tensor:
        """Choose the first experts of each group."""
        return self._by(torch.zeros_like(self.scores.saliency), number)

    def drawn(self, number: int, seed: int) -> Tensor:
        """Choose at random."""
        generator = torch.Generator().manual_seed(seed)
        return self._by(torch.rand(self.scores.saliency.shape, generator=generator, dtype=torch.float64), number)

    def _by(self, saliency: Tensor, number: int) -> Tensor:
        return choose_experts(
            ExpertScores(self.scores.layers, self.scores.tokens, saliency), number, "reap", self._groups
        )

    @property
    def _groups(self) -> int:
        return int(self.losses.model.config.n_group or 1)

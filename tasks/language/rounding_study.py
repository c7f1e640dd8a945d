"""What rounding costs a mixture of experts, and what training with rounded experts wins back: answers side by side.

A model is trained on for some steps twice, on the same texts in the same order: in float, which is the control, and
fake-quantised. What is compared is the control after rounding with the other model, each as it would be deployed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.backbones.joyai_checkpoint import check_tokenizer, load_model
from pyra.experts import QuantisingConfig, fake_quantise, undo_fake_quantise
from pyra.tasks.language.answer_loss import AnswerLoss, answer_loss
from pyra.tasks.language.calibration import encoded
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.models import load_encoder, longest
from pyra.tasks.language.pretraining import Recipe, pretrain, texts_of
from pyra.tasks.language.tokens import Answered, Encoder


@dataclass(frozen=True, kw_only=True)
class RoundingRow:
    """A model of the table.

    Attributes:
        name: ``original``, ``rounded``, ``trained on``, ``trained on, then rounded`` or ``trained rounded``.
        bits: of its experts' weights; None in float.
        group_size: inputs that share a scale; None in float.
        seed: of the order of the texts; None where nothing was trained.
        nll: nats a token of the test answers.
        difference: of that to the original's; None for that itself.
        error: standard error of the difference, over examples in pairs.
        over_control: of a model that was trained rounded, the difference to the control of the same seed, rounded.
        over_control_error: its standard error.
    """

    name: str
    bits: int | None = None
    group_size: int | None = None
    seed: int | None = None
    nll: float
    difference: float | None = None
    error: float | None = None
    over_control: float | None = None
    over_control_error: float | None = None


@dataclass
class RoundingStudy:
    """A model, the answers that it is measured on and the texts that it is trained on.

    Attributes:
        model: as it was.
        encoder: its tokenizer.
        rows: test answers.
        told: what the record says of them.
        texts: of the training split.
        batch_size: answers a forward.
        recipe: of further training; its seed is left to each row.
        tell: called with what is being done.
    """

    model: JoyAIForCausalLM
    encoder: Encoder
    rows: list[Answered]
    told: dict[str, Any]
    texts: list[str]
    batch_size: int
    recipe: dict[str, Any]
    tell: Callable[[str], object] = lambda _: None

    @classmethod
    def of(
        cls,
        backbone: str,
        task: str,
        root: str | None,
        data: str | None,
        limit: int | None,
        batch_size: int,
        recipe: dict[str, Any],
    ) -> RoundingStudy:
        """Load a checkpoint and the texts of a task; errors as of ``pyra compress-experts``."""
        texts, encoder = load_text_task(task, root, data), load_encoder(backbone)
        model = load_model(backbone).eval()
        check_tokenizer(encoder.tokenizer, model.config)
        test = encoded(texts, encoder, "test", limit, longest(backbone, model.config, encoder.tokenizer, None))
        return cls(model, encoder, test.rows, test.told, texts_of([texts], "train"), batch_size, recipe)

    def table(self, rounding: list[QuantisingConfig], trained: list[QuantisingConfig], seeds: int) -> Iterator[Any]:
        """Yield a row for the model, one for each way to round it, and for each seed the control and what is trained.

        Args:
            rounding: ways to round the model as it is.
            trained: those among them that it is trained with.
            seeds: orders of the texts.
        """
        before = self._loss(self.model, "original")
        yield RoundingRow(name="original", nll=before.mean)
        for config in rounding:
            yield self._row("rounded", self._rounded(self.model, config), before, config)
        for seed in range(seeds):
            control = self._trained(None, seed)
            yield self._row("trained on", self._loss(control, f"trained on, seed {seed}"), before, seed=seed)
            for config in trained:
                later = self._rounded(control, config)
                yield self._row("trained on, then rounded", later, before, config, seed)
                model = self._trained(config, seed)
                loss = self._loss(model, f"trained rounded, {config.bits} bits, seed {seed}")
                yield self._row("trained rounded", loss, before, config, seed, later)

    def _row(
        self,
        name: str,
        loss: AnswerLoss,
        before: AnswerLoss,
        config: QuantisingConfig | None = None,
        seed: int | None = None,
        control: AnswerLoss | None = None,
    ) -> RoundingRow:
        how = {} if config is None else {"bits": config.bits, "group_size": config.group_size}
        difference, error = loss.difference(before)
        over, over_error = (None, None) if control is None else loss.difference(control)
        return RoundingRow(
            name=name,
            seed=seed,
            nll=loss.mean,
            difference=difference,
            error=error,
            over_control=over,
            over_control_error=over_error,
            **how,
        )

    def _rounded(self, model: JoyAIForCausalLM, config: QuantisingConfig) -> AnswerLoss:
        """Measure a float model as it would be after rounding; it stays float."""
        loss = self._loss(fake_quantise(model, config), f"{config.bits} bits in groups of {config.group_size}")
        undo_fake_quantise(model)
        return loss

    def _trained(self, config: QuantisingConfig | None, seed: int) -> JoyAIForCausalLM:
        model = copy.deepcopy(self.model).requires_grad_(True)
        if config is not None:
            fake_quantise(model, config)
        self.tell(f"training, seed {seed}, {'float' if config is None else f'{config.bits} bits'}")
        pretrain(model, self.encoder.tokenizer, self.texts, Recipe(**self.recipe, seed=seed))
        return model

    def _loss(self, model: JoyAIForCausalLM, what: str) -> AnswerLoss:
        self.tell(f"answers: {what}")
        return answer_loss(model, self.rows, self.encoder, batch_size=self.batch_size, description=what)

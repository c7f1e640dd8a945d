"""Training the MTP layer of a JoyAI on the texts of a task: alone behind a decoder that stays, or with its adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from pyra.adapters import adapt, fold_adapter
from pyra.adapters.methods import peft_config
from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.backbones.joyai_mtp import IGNORED, LOSS_WEIGHT, attach_mtp, attached_layer, mtp_logits, mtp_loss, mtp_states
from pyra.errors import ConfigError, TrainingError
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.language.tokens import Answered, Encoder, by_length, mask, pad
from pyra.tasks.language.training import Rows, batcher

TRUNKS = ("frozen", "lora")


@dataclass(frozen=True, kw_only=True)
class MtpRecipe:
    """How the layer is trained.

    Attributes:
        trunk: ``frozen`` leaves the decoder as it is; ``lora`` trains an adapter of its attention along, which is
            folded in at the end.
        weight: of the layer's loss beside the decoder's, where that trains, too.
        answers_only: take no loss of prompts.
        rank: of the adapter.
        steps: of AdamW.
        batch_size: texts a step.
        lr: peak learning rate; one cosine over all steps.
        seed: of the order of texts, and of weights that are drawn.
    """

    trunk: str = "frozen"
    weight: float = LOSS_WEIGHT
    answers_only: bool = False
    rank: int = 16
    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; raises :class:`ConfigError` with all problems."""
        numbers = ("weight", "rank", "steps", "batch_size", "lr")
        problems = [f"--{name.replace('_', '-')} must be above 0" for name in numbers if not getattr(self, name) > 0]
        if self.trunk not in TRUNKS:
            problems.append(f"--trunk must be one of {', '.join(TRUNKS)}, got {self.trunk!r}")
        if problems:
            raise ConfigError("; ".join(problems))


class MtpObjective(nn.Module):
    """What is minimised: the layer's loss, or the decoder's with a share of it.

    Args:
        model: a JoyAI with the layer attached, or an adapter around one.
        weight: of the layer's loss beside the decoder's; None leaves the decoder out, which then has no gradients.
    """

    def __init__(self, model: nn.Module, weight: float | None) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch [B, N]."""
        told: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        if self.weight is None:
            decoder: Any = joyai_of(self.model).get_decoder()
            with torch.no_grad():
                hidden = decoder(input_ids, **told).last_hidden_state
            return {"loss": mtp_loss(self.model, hidden, input_ids, labels, attention_mask=attention_mask)}
        outputs = self.model(input_ids, labels=labels, output_hidden_states=-1, **told)
        drafts = mtp_loss(self.model, outputs.hidden_states[-1], input_ids, labels, attention_mask=attention_mask)
        return {"loss": outputs.loss + self.weight * drafts}


def joyai_of(model: Any) -> JoyAIForCausalLM:
    """Return the model itself, or the one inside an adapter."""
    found: JoyAIForCausalLM = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found


def train_mtp(
    model: JoyAIForCausalLM,
    rows: Sequence[Answered],
    pad_id: int,
    recipe: MtpRecipe,
    device: torch.device,
    source: Path | None = None,
) -> tuple[JoyAIForCausalLM, list[float]]:
    """Train the layer on ``transformers.Trainer``.

    Args:
        model: without the layer; its own weights stay, to the bit, unless ``recipe`` adapts them.
        rows: prompts with their answers.
        pad_id: fills batches.
        recipe: how.
        device: to train on.
        source: a checkpoint folder whose layer is trained further; None makes a new one.

    Returns:
        The model with the layer attached, in its own type; the loss of the first step and the mean of every ten.

    Raises:
        TrainingError: where the loss or a weight is no number.
    """
    model.requires_grad_(False)
    trained: Any = model
    if recipe.trunk == "lora":
        trained = adapt(model, peft=peft_config("lora", recipe.rank))
    layer = attached_layer(attach_mtp(trained, source, seed=recipe.seed)).float().requires_grad_(True)
    objective = MtpObjective(trained, recipe.weight if recipe.trunk == "lora" else None)
    with tempfile.TemporaryDirectory() as folder:  # for the trainer, which writes nothing
        trainer = Trainer(
            model=objective,
            args=_arguments(recipe, folder, device),
            train_dataset=Rows(_labelled(rows, recipe)),
            data_collator=batcher(False, pad_id),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(ProgressBar("MTP layer: training"))
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if broken := [name for name, value in layer.named_parameters() if not value.isfinite().all()]:
        raise TrainingError(f"{broken[0]} of the MTP layer is no number after {recipe.steps} steps: lower --lr")
    layer.to(model.dtype)
    whole: Any = fold_adapter(trained) if recipe.trunk == "lora" else model
    return whole.eval().requires_grad_(False), losses


def _arguments(recipe: MtpRecipe, folder: str, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        adam_beta2=0.95,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        max_grad_norm=1.0,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        seed=recipe.seed,
        dataloader_pin_memory=device.type != "cpu",
    )


def _labelled(rows: Sequence[Answered], recipe: MtpRecipe) -> list[dict[str, Any]]:
    starts = [row.start if recipe.answers_only else 0 for row in rows]
    return [
        {"input_ids": row.ids, "labels": [IGNORED] * start + row.ids[start:]}
        for row, start in zip(rows, starts, strict=True)
    ]


@torch.no_grad()
def held_out_mtp(
    model: JoyAIForCausalLM, rows: Sequence[Answered], encoder: Encoder, batch_size: int
) -> dict[str, float]:
    """Measure the layer on answers of other texts.

    Returns:
        ``mtp``: nats a token of the layer, two tokens ahead; ``decoder``: of the decoder, one token ahead; ``agree``:
        share of the tokens for which the layer's first choice is the decoder's; ``tokens``: that were counted.
    """
    layer, device = attached_layer(model), model.device
    decoder: Any = model.get_decoder()
    nats, sums, agreed, tokens = 0.0, 0.0, 0, 0
    for batch in by_length([len(row.ids) for row in rows], batch_size):
        chosen = [rows[index] for index in batch]
        ids, attended = (make([row.ids for row in chosen]).to(device) for make in (_filled(encoder), mask))
        hidden = decoder(ids, attention_mask=attended, use_cache=False).last_hidden_state
        places = torch.arange(2, ids.shape[1], device=device)
        starts = torch.tensor([row.start for row in chosen], device=device).unsqueeze(1)
        counts = attended[:, 2:].bool() & (places >= starts)
        states = mtp_states(model, layer, hidden[:, :-2], ids[:, 1:-1])  # padding stands at the right
        drafted, said = mtp_logits(model, states[counts]), mtp_logits(model, hidden[:, 1:-1][counts])
        targets = ids[:, 2:][counts]
        nats += float(nn.functional.cross_entropy(drafted, targets, reduction="sum"))
        sums += float(nn.functional.cross_entropy(said, targets, reduction="sum"))
        agreed += int((drafted.argmax(-1) == said.argmax(-1)).sum())
        tokens += len(targets)
    return {"mtp": nats / tokens, "decoder": sums / tokens, "agree": agreed / tokens, "tokens": tokens}


def _filled(encoder: Encoder) -> Any:
    return lambda rows: pad(rows, encoder.pad_id)

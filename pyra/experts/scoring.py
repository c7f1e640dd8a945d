"""How much a task uses each expert, measured on its text.

Three scores: the number of tokens that the router sends to an expert, the sum of the gates that it gives it, and REAP's
saliency: the mean, over those tokens, of the gate times the norm of what the expert adds (router-weighted expert
activation pruning, arXiv 2510.13999).

Letters: ``L`` layers with experts, ``E`` experts, ``T`` tokens, ``k`` experts a token, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, DataError
from pyra.experts.layers import expert_layers

METHODS: tuple[str, ...] = ("reap", "frequency")


@dataclass(frozen=True)
class ExpertScores:
    """What was measured on a text.

    Attributes:
        layers: names of the layers that have experts.
        tokens: [L, E] int64, tokens that each expert was given.
        saliency: [L, E] float64, REAP's score; 0 for an expert that was given none.
        gates: [L, E] float64, sum of the gates that each expert was given its tokens with; None where not measured.
    """

    layers: tuple[str, ...]
    tokens: Tensor
    saliency: Tensor
    gates: Tensor | None = None

    def by(self, method: str) -> Tensor:
        """Return [L, E] float64: what experts are ranked by, of :data:`METHODS`; :class:`ConfigError` for another."""
        if method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return self.saliency if method == "reap" else self.tokens.double()


def score_experts(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> ExpertScores:
    """Run a model on batches, without gradients and in evaluation mode, and measure its experts.

    Each expert's output is computed a second time beside the model, one expert after another.

    Args:
        model: with layers as :func:`~pyra.experts.layers.expert_layers` finds them.
        batches: keyword arguments of its forward; tokens whose ``attention_mask`` is 0 do not count.

    Raises:
        UnsupportedModelError: for a model without experts.
        ConfigError: for what is no batch.
        DataError: for batches without a token, or outputs that are not finite.
    """
    layers = expert_layers(model)
    counts = [torch.zeros(layer.experts.num_experts, dtype=torch.int64) for layer in layers.values()]
    sums = [torch.zeros(layer.experts.num_experts, dtype=torch.float64) for layer in layers.values()]
    gated = [torch.zeros_like(zeros) for zeros in sums]
    counted: list[Tensor | None] = [None]

    def look(index: int, experts: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, gates = arguments
        if counted[0] is not None:
            hidden, chosen, gates = (value[counted[0].to(value.device)] for value in (hidden, chosen, gates))
        for expert in chosen.unique().tolist():
            if expert >= experts.num_experts:  # what expert parallelism sends elsewhere
                continue
            rows, slots = torch.where(chosen == expert)
            gate, up = (hidden[rows] @ experts.gate_up_proj[expert].mT).chunk(2, dim=-1)
            added = (experts.act_fn(gate) * up) @ experts.down_proj[expert].mT
            counts[index][expert] += len(rows)
            given = gates[rows, slots].double()
            gated[index][expert] += given.sum().cpu()
            sums[index][expert] += (given * added.double().norm(dim=-1)).sum().cpu()

    hooks = [
        layer.experts.register_forward_pre_hook(partial(look, index)) for index, layer in enumerate(layers.values())
    ]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                if not isinstance(batch, Mapping) or "input_ids" not in batch:
                    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                    raise ConfigError(f"score_experts reads batches with input_ids and attention_mask, got {found}")
                mask = batch.get("attention_mask")
                counted[0] = None if mask is None else mask.flatten().bool()
                model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    tokens, total = torch.stack(counts), torch.stack(sums)
    if not tokens.sum():
        raise DataError("the text to score experts on has no tokens")
    if not total.isfinite().all():
        raise DataError("the experts' outputs on this text are not finite: load the model in bfloat16 or float32")
    return ExpertScores(tuple(layers), tokens, total / tokens.clamp(min=1), torch.stack(gated))

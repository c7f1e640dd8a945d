"""A model with fewer experts: stacks and routers are cut, everything else stays as it is.

Where a model normalises its gates (``norm_topk_prob``, as JoyAI does), those of the experts that are left are shares
of their own sum; nothing is to be done about the others. A token that was only ever sent to experts that stay gets the
same output as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyra.errors import ConfigError
from pyra.experts.layers import expert_layers
from pyra.experts.scoring import ExpertScores

BIAS = "e_score_correction_bias"
"""Of a router: added to the scores that experts are chosen by, not to their gates."""


def choose_experts(scores: ExpertScores, keep: int, method: str = "reap", groups: int = 1) -> Tensor:
    """Return [L, keep] int64, ascending: the experts of each layer with the highest score; of equals the first.

    Args:
        scores: of the task.
        keep: experts that stay in every layer; configurations have one number for all.
        method: ``"reap"`` or ``"frequency"``.
        groups: of the router (``n_group``); as many stay in each, so that every expert stays in its group.

    Raises:
        ConfigError: for a number that is none, or that the groups do not divide.
    """
    ranked = scores.by(method)
    experts = ranked.shape[1]
    if not 1 <= keep <= experts:
        raise ConfigError(f"keep must be a number of experts from 1 to {experts}, got {keep}")
    if groups < 1 or keep % groups or experts % groups:
        raise ConfigError(f"{groups} groups do not divide {keep} of {experts} experts")
    best = ranked.unflatten(1, (groups, -1)).argsort(dim=2, descending=True, stable=True)[..., : keep // groups]
    starts = torch.arange(groups)[:, None] * (experts // groups)
    return (best.sort(dim=2).values + starts).flatten(1)


def prune_experts(model: nn.Module, kept: Tensor | Sequence[Sequence[int]]) -> nn.Module:
    """Cut a model down to some of its experts, in place.

    Args:
        model: with layers as :func:`~pyra.experts.layers.expert_layers` finds them.
        kept: [L, K] numbers of the experts that stay, in every layer as many.

    Returns:
        The model, whose ``config`` says the new number.

    Raises:
        ConfigError: naming what cannot be: numbers out of range or twice, fewer experts than a token is sent to, or a
            number that the router's groups do not divide. Nothing has changed then.
    """
    layers = expert_layers(model)
    kept = torch.as_tensor(kept)
    problems = pruning_problems(list(layers.values()), kept)
    if problems:
        raise ConfigError("; ".join(problems))
    with torch.no_grad():
        for index, layer in zip(kept, layers.values(), strict=True):
            for owner, name in ((layer.experts, "gate_up_proj"), (layer.experts, "down_proj"), (layer.gate, "weight")):
                old = getattr(owner, name)
                new = nn.Parameter(old[index.to(old.device)].clone(), requires_grad=old.requires_grad)
                setattr(owner, name, new)
            if hasattr(layer.gate, BIAS):
                bias = getattr(layer.gate, BIAS)
                setattr(layer.gate, BIAS, bias[index.to(bias.device)].clone())
            layer.experts.num_experts = layer.gate.num_experts = len(index)
    config: Any = model.config
    config.num_local_experts = kept.shape[1]  # under the name that each configuration has for it
    return model


def set_active_experts(model: nn.Module, number: int) -> nn.Module:
    """Send each token to another number of experts, in place; return the model.

    Raises:
        ConfigError: for a number that a layer does not have.
    """
    layers = expert_layers(model)
    most = min(layer.gate.num_experts for layer in layers.values())
    if not 1 <= number <= most:
        raise ConfigError(f"a token can be sent to 1 to {most} experts, got {number}")
    for layer in layers.values():
        layer.gate.top_k = number
    config: Any = model.config
    config.num_experts_per_tok = number
    return model


def pruning_problems(layers: list[Any], kept: Tensor) -> list[str]:
    """List why experts cannot stay; arguments as of :func:`prune_experts`."""
    if kept.ndim != 2 or kept.shape[0] != len(layers) or kept.is_floating_point() or not kept.shape[1]:
        return [f"kept must be whole numbers [{len(layers)}, K], got {kept.dtype} {list(kept.shape)}"]
    problems = []
    for index, layer in zip(kept, layers, strict=True):
        experts, active, groups = layer.gate.num_experts, layer.gate.top_k, getattr(layer.gate, "num_group", 1)
        if index.min() < 0 or index.max() >= experts:
            problems.append(f"kept names expert {int(index[(index < 0) | (index >= experts)][0])}, of {experts}")
        if len(index.unique()) < len(index):
            problems.append("kept names an expert twice in a layer")
        if len(index) < active:
            problems.append(f"{len(index)} experts stay, and a token is sent to {active}: lower that first")
        if len(index) % groups or len(index) // groups < 2:
            problems.append(f"{len(index)} experts do not make the router's {groups} groups of two or more")
    return list(dict.fromkeys(problems))

"""FiberPO on trl: GRPO's rollouts, rewards and advantages under the gate of :mod:`pyra.tasks.posttraining.fiberpo`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from pyra.errors import ConfigError
from pyra.tasks.posttraining.fiberpo import (
    C_MINUS,
    C_PLUS,
    EMPTY,
    EPS,
    PASSES,
    ROLLS_BACK,
    UPDATES,
    ZEROED,
    FiberLevel,
    budget_problems,
    fiberpo_log_gate,
    fiberpo_regimes,
    group_problems,
    group_regimes,
    prompt_groups,
)

_REGIMES = {"passing": PASSES, "rolling_back": ROLLS_BACK, "zeroed": ZEROED}
# of the forward, where a batch has them
_INPUTS = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
           "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip
# options of GRPOConfig that belong to other losses
_OTHERS = ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "off_policy_mask_threshold",
           "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy")  # fmt: skip
_BUDGETS = ("c_plus", "c_minus", "fiber_eps")
_OF_GROUPS = ("group_c_plus", "group_c_minus", "group_eps")


@dataclass
class FiberPOConfig(GRPOConfig):
    """Modifications: the budgets of FiberPO; four updates on each rollout; a mean over tokens, then over trajectories.

    On the first update of a rollout FiberPO is the plain policy gradient: it differs from it in those after. Options
    that belong to other losses are refused. The budgets' defaults are ours: the published values are not known.

    Args:
        c_plus: budget of a trajectory's mean upward drift, in nats a token.
        c_minus: budget of its mean downward drift, below ``c_plus``.
        fiber_eps: how far a token may move beside its trajectory, well below ``c_plus + c_minus``.
        group_c_plus: budget of the mean upward drift of the answers to one prompt, below ``c_plus``; with the two
            below, or none of the three: no level above trajectories. That level is an extension of ours.
        group_c_minus: budget of its mean downward drift, below ``c_minus`` and ``group_c_plus``.
        group_eps: how far an answer may drift beside the others to its prompt.

    Raises:
        ConfigError: naming every option that cannot be used.
    """

    loss_type: str = field(default="grpo", metadata={"help": "how losses are averaged: 'grpo' alone"})
    num_iterations: int = field(default=UPDATES, metadata={"help": "updates on each rollout"})
    c_plus: float = field(default=C_PLUS, metadata={"help": "budget of a trajectory's mean upward drift"})
    c_minus: float = field(default=C_MINUS, metadata={"help": "budget of its mean downward drift"})
    fiber_eps: float = field(default=EPS, metadata={"help": "how far a token may move beside its trajectory"})
    group_c_plus: float | None = field(default=None, metadata={"help": "budget of a prompt's mean upward drift"})
    group_c_minus: float | None = field(default=None, metadata={"help": "budget of its mean downward drift"})
    group_eps: float | None = field(default=None, metadata={"help": "how far an answer may drift beside the others"})

    def __post_init__(self) -> None:
        """Check what trl does not know of."""
        super().__post_init__()
        defaults = {one.name: one.default for one in fields(self)}
        problems = [
            f"{name}={getattr(self, name)!r} belongs to another loss than FiberPO's: leave it out"
            for name in _OTHERS
            if getattr(self, name) != defaults[name]
        ]
        problems += budget_problems(self.c_plus, self.c_minus, self.fiber_eps, _BUDGETS)
        of_groups = (self.group_c_plus, self.group_c_minus, self.group_eps)
        problems += group_problems(of_groups, (self.c_plus, self.c_minus), _OF_GROUPS)
        if problems:
            raise ConfigError("; ".join(problems))


class FiberPOTrainer(GRPOTrainer):
    """Modifications: the loss of a token is ``-G A``, without a minimum with an unclipped term; regimes are logged.

    As GRPO's: tool masks, the correction for samples of vLLM, the KL term of ``beta``, the balance of experts.
    Under ``fiberpo/`` are logged the shares of trajectories, and of tokens by their trajectory, that pass, roll back
    and are zeroed, and of tokens that are clipped beside their trajectory; under ``ratio/`` the ratio itself.

    With ``group_c_plus``, ``group_c_minus`` and ``group_eps``, the answers to one prompt are a level of the gate above
    trajectories, and the shares of groups, and of trajectories that are clipped beside their group, are logged too. trl
    shuffles the answers of a rollout and cuts them into steps, parts of a step and processes: a group is those answers
    to a prompt that are in the same part of the same process, which are all of them where ``steps_per_generation`` is 1
    and there is one process. Prompts of the same tokens are one prompt, also where their images differ. There is no
    level of domains here: trl gives columns of the data to rewards alone, none reaches the loss. Domains are what
    :func:`~pyra.tasks.posttraining.fiberpo.fiberpo_log_gate` takes as a further level.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "fiberpo"]
    _name = "FiberPO"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, FiberPOConfig):
            raise ConfigError(f"FiberPOTrainer: args must be a FiberPOConfig, got {type(self.args).__name__}")

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in _INPUTS if name in inputs},
        )
        old = inputs.get("old_per_token_logps")  # None where every update has a rollout of its own
        log_ratio = logps - (logps.detach() if old is None else old)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        levels = self._levels(inputs)
        losses = -fiberpo_log_gate(log_ratio, mask, **self._budgets, levels=levels).exp() * advantages
        if "importance_sampling_ratio" in inputs:
            losses = losses * inputs["importance_sampling_ratio"]
        if self.beta != 0.0:
            losses = losses + self.beta * self._divergence(logps, log_ratio, inputs["ref_per_token_logps"], mask)
        loss = trajectory_mean(losses, mask).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._note("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
        self._log_regimes(log_ratio.detach(), entropies, mask)
        for level in levels:
            self._log_groups(log_ratio.detach(), mask, level)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    @property
    def _budgets(self) -> dict[str, Any]:
        return {"c_plus": self.args.c_plus, "c_minus": self.args.c_minus, "eps": self.args.fiber_eps}

    def _levels(self, inputs: dict[str, Any]) -> list[FiberLevel]:
        """Return the groups of answers to one prompt, where there is such a level."""
        plus, minus, eps = (getattr(self.args, name) for name in _OF_GROUPS)
        if eps is None:
            return []
        return [FiberLevel(prompt_groups(inputs["prompt_ids"], inputs["prompt_mask"]), plus, minus, eps)]

    def _divergence(self, logps: Tensor, log_ratio: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """Return the KL divergence from the reference [B, T], estimated as GRPO does."""
        apart = reference - logps
        found = apart.exp() - apart - 1
        if self.args.use_bias_correction_kl:
            found = found * log_ratio.exp()
        (mean,) = self._shares(mask.sum(), (found.detach() * mask).sum())
        self._note("kl", mean)
        return found

    def _log_regimes(self, log_ratio: Tensor, entropies: Tensor, mask: Tensor) -> None:
        found = fiberpo_regimes(log_ratio, mask, **self._budgets)
        tokens = mask.sum(1)
        counts = [(found.trajectories == state).sum() for state in _REGIMES.values()]
        for name, share in zip(_REGIMES, self._shares((found.trajectories != EMPTY).sum(), *counts), strict=True):
            self._note(f"fiberpo/trajectories/{name}", share)
        sums = [tokens[found.trajectories == state].sum() for state in _REGIMES.values()]
        sums += [found.clipped.sum(), (log_ratio.exp() * mask).sum(), (entropies.detach() * mask).sum()]
        names = [*(f"fiberpo/tokens/{name}" for name in _REGIMES), "fiberpo/tokens/clipped", "ratio/mean", "entropy"]
        for name, share in zip(names, self._shares(tokens.sum(), *sums), strict=True):
            self._note(name, share)
        largest = torch.where(mask.bool(), log_ratio, 0.0).abs().max().exp()
        self._note("ratio/farthest", self.accelerator.gather(largest).max().item())

    def _log_groups(self, log_ratio: Tensor, mask: Tensor, level: FiberLevel) -> None:
        found = group_regimes(log_ratio, mask, level, c_plus=self.args.c_plus, c_minus=self.args.c_minus)
        counts = [(found.groups == state).sum() for state in _REGIMES.values()]
        for name, share in zip(_REGIMES, self._shares((found.groups != EMPTY).sum(), *counts), strict=True):
            self._note(f"fiberpo/groups/{name}", share)
        (share,) = self._shares(mask.any(1).sum(), found.clipped.sum())
        self._note("fiberpo/trajectories/clipped", share)

    def _shares(self, whole: Tensor, *parts: Tensor) -> list[float]:
        """Return parts of a whole, over all processes."""
        summed = self.accelerator.reduce(torch.stack([part.float() for part in (whole, *parts)]), reduction="sum")
        return (summed[1:] / summed[0].clamp(min=1)).tolist()

    def _note(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)


def trajectory_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return [B]: the mean of values [B, T] over the tokens of the mask, 0 where there are none."""
    return torch.where(mask.bool(), values, 0.0).sum(1) / mask.sum(1).clamp(min=1)

"""The three algorithms of ``pyra rl`` as trainers of trl, and what is kept of their logs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from pyra.adapters.several import share_rate
from pyra.errors import ConfigError
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.fiberpo_trainer import FiberPOConfig, FiberPOTrainer
from pyra.tasks.posttraining.questions import Question
from pyra.tasks.posttraining.rewards import Guarded
from pyra.tasks.posttraining.rl_options import CLIPS, RlOptions
from pyra.tasks.posttraining.trainer import PostTrainer

Entry = dict[str, float]

REFERENCE = "ref"
"""Adapter that trl adds, a copy of the one that is trained, where it is to be compared with how it began."""

CURVES = {
    "loss": "loss",
    "reward": "reward",
    "rewards/answer/mean": "accuracy",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut",
    "frac_reward_zero_std": "groups_alike",
    "kl": "kl",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "ratio/mean": "ratio",
    "ratio/farthest": "farthest_ratio",
    "clip_ratio/region_mean": "clipped",
    "fiberpo/trajectories/passing": "trajectories_passing",
    "fiberpo/trajectories/rolling_back": "trajectories_rolling_back",
    "fiberpo/trajectories/zeroed": "trajectories_zeroed",
    "fiberpo/trajectories/clipped": "trajectories_clipped",
    "fiberpo/groups/passing": "groups_passing",
    "fiberpo/groups/rolling_back": "groups_rolling_back",
    "fiberpo/groups/zeroed": "groups_zeroed",
    "fiberpo/tokens/passing": "tokens_passing",
    "fiberpo/tokens/rolling_back": "tokens_rolling_back",
    "fiberpo/tokens/zeroed": "tokens_zeroed",
    "fiberpo/tokens/clipped": "clipped",
}
"""What a trainer logs -> what ``training.json`` calls it. What is about rollouts stands at their first step alone."""


class _Rollouts(PostTrainer):
    """Modifications: prompts come in groups, as trl's trainer of rollouts wants them."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return GRPOTrainer._get_train_sampler(self, train_dataset)


class RatioTrainer(_Rollouts, GRPOTrainer):
    """Modifications: those of :class:`PostTrainer`."""


class FiberTrainer(_Rollouts, FiberPOTrainer):
    """Modifications: those of :class:`PostTrainer`."""


def rollout_trainer(
    model: nn.Module,
    encoder: Encoder,
    questions: Sequence[Question],
    rewards: Sequence[Guarded],
    optimizer: Callable[[], torch.optim.Optimizer],
    options: RlOptions,
    values: Mapping[str, Any],
) -> PostTrainer:
    """Make the trainer of a run.

    Args:
        model: adapted.
        encoder: with its chat template.
        questions: to train on.
        rewards: added up.
        optimizer: makes the optimiser.
        options: of the run.
        values: what every trainer is told.

    Raises:
        ConfigError: for what trl's trainer cannot train.
    """
    fiber = options.algorithm == "fiberpo"
    kind: Any = FiberTrainer if fiber else RatioTrainer
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.pad_id)  # trl's own choice may be in no vocabulary
    rows = [{"prompt": [dict(turn) for turn in one.messages], "answer": one.answer} for one in questions]
    arguments = {**values, **_values(options), "chat_template_kwargs": dict(encoder.values)}
    try:
        made: PostTrainer = kind(
            optimizer,
            model=model,
            reward_funcs=list(rewards),
            args=(FiberPOConfig if fiber else GRPOConfig)(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    except ConfigError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"trl cannot train this: {' '.join(str(error).split())[:300]}") from None
    if REFERENCE in getattr(model, "peft_config", {}):
        share_rate(model, REFERENCE)
    return made


def _values(options: RlOptions) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_generations": options.group,
        "num_iterations": options.updates,
        # A run that is gone on with draws anew: it does so where a rollout ends.
        "save_steps": options.updates * math.ceil(options.save_steps / options.updates),
        "logging_steps": 1,
        "temperature": options.temperature,
        "max_completion_length": options.max_new_tokens,
        "beta": options.beta,
        "loss_type": "grpo",
        "disable_dropout": True,  # the probabilities of a rollout would else differ from those of its first update
        "dataloader_drop_last": True,
    }
    if options.algorithm == "fiberpo":
        names = ("c_plus", "c_minus", "fiber_eps", "group_c_plus", "group_c_minus", "group_eps")
        return values | {name: getattr(options, name) for name in names}
    level = "sequence" if options.algorithm == "gspo" else "token"
    clip = CLIPS[options.algorithm] if options.clip is None else options.clip
    return values | {"epsilon": clip, "importance_sampling_level": level}


def curves_of(history: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Return by step what was logged, under the names of :data:`CURVES`; what is no number is left out."""
    entries = []
    for logged in history:
        if "loss" in logged:
            named = {CURVES[name]: value for name, value in logged.items() if name in CURVES}
            named |= {name: value for name, value in logged.items() if name.endswith("/failed")}
            numbers = {name: float(value) for name, value in named.items() if value is not None}
            entries.append({"step": logged["step"], **{n: v for n, v in numbers.items() if math.isfinite(v)}})
    return entries

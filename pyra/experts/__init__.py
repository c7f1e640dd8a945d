"""Routed experts of a mixture: which a task uses, a smaller model without the others, experts rounded to few bits."""

from pyra.experts.choosing import choose_task_experts
from pyra.experts.masking import only_experts
from pyra.experts.pruning import choose_experts, prune_experts, set_active_experts
from pyra.experts.quantising import QuantisingConfig, fake_quantise, quantising_config, undo_fake_quantise
from pyra.experts.scoring import ExpertScores, score_experts

__all__ = [
    "ExpertScores",
    "QuantisingConfig",
    "choose_experts",
    "choose_task_experts",
    "fake_quantise",
    "only_experts",
    "prune_experts",
    "quantising_config",
    "score_experts",
    "set_active_experts",
    "undo_fake_quantise",
]

"""Routed experts of a mixture: which a task uses, and a smaller model without the others."""

from pyra.experts.choosing import choose_task_experts
from pyra.experts.masking import only_experts
from pyra.experts.pruning import choose_experts, prune_experts, set_active_experts
from pyra.experts.scoring import ExpertScores, score_experts

__all__ = [
    "ExpertScores",
    "choose_experts",
    "choose_task_experts",
    "only_experts",
    "prune_experts",
    "score_experts",
    "set_active_experts",
]

"""The experts that a task uses: what expert-specialised fine-tuning trains (ESFT, arXiv 2407.01906, section 3)."""

from __future__ import annotations

import math

from pyra.errors import ConfigError, did_you_mean
from pyra.experts.scoring import ExpertScores

SHARES: dict[str, float] = {"gate": 0.1, "token": 0.2}
"""ESFT's published thresholds."""


def choose_task_experts(scores: ExpertScores, share: float | None = None, by: str = "gate") -> dict[str, list[int]]:
    """Return the smallest sets of experts, one a layer, that hold a share of what a layer's experts were given.

    An expert's part is the sum of its gates over that of all experts of the layer (``by="gate"``, ESFT-Gate), or the
    number of its tokens over that of all (``by="token"``, ESFT-Token), on a sample of the task's text. The experts with
    the largest parts are taken until these reach ``share``: 0.1 means that a tenth of all gate weight goes to experts
    that are trained. ESFT took 2 to 15 of 64 experts a layer so. Where gates of a token do not add up to a constant
    (``norm_topk_prob`` false), ESFT does not divide by their sum, and the same threshold takes more experts there.

    Args:
        scores: of the task, from :func:`~pyra.experts.score_experts`.
        share: above 0, at most 1; ESFT's threshold by default: 0.1 of the gates, 0.2 of the tokens.
        by: ``"gate"`` or ``"token"``.

    Returns:
        Indices of experts, ascending, by the name of the layer: ``ExpertLoraConfig(experts=...)`` takes it.

    Raises:
        ConfigError: for values that are none, or scores without gates.
    """
    if by not in SHARES:
        raise ConfigError(f"by must be one of {', '.join(SHARES)}, got {by!r}{did_you_mean(str(by), SHARES)}")
    share = SHARES[by] if share is None else share
    if not 0 < share <= 1:
        raise ConfigError(f"share must be above 0 and at most 1, got {share!r}")
    measured = scores.gates if by == "gate" else scores.tokens.double()
    if measured is None:
        raise ConfigError('these scores hold no gates: measure them with score_experts, or choose by="token"')
    chosen = {}
    for layer, given in zip(scores.layers, measured.tolist(), strict=True):
        ranked = sorted(range(len(given)), key=lambda expert: (-given[expert], expert))
        reached = [math.fsum(given[expert] for expert in ranked[: count + 1]) for count in range(len(ranked))]
        wanted = share * reached[-1] * (1 - 1e-12)  # a share of exactly what some experts hold takes no more of them
        count = next(index for index, value in enumerate(reached, start=1) if value >= wanted)
        chosen[layer] = sorted(ranked[:count])
    return chosen

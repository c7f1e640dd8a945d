"""Which tokens of a prompt fold into which: attention scores, or keys -> :class:`PromptPlan`.

A decoder reads a prompt once and answers it token by token. Tokens to which the end of the prompt pays least attention
fold into the next token that survives, which keeps its own position: nothing moves ahead of what it stands for, so no
token learns of its future. The first token (where attention rests that has no other place), the last ones of the prompt
and every token of the answer are never touched.

How many tokens a row loses depends on the length of its own prompt alone, so a row of a batch answers as it does alone.
Rows are kept equally long by padding, which the plan drops and, where a batch has too little of it, adds in front.

Letters: ``B`` batch, ``N`` tokens, ``H`` query heads, ``G`` key heads, ``d`` head channels, ``r`` tokens removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyra.matching import MergePlan

RULES: tuple[str, ...] = ("importance", "bipartite", "drop", "truncate")
FIRST, LAST = 1, 16
"""Tokens at the beginning and the end of a prompt that stay; the latter also tell what is important."""
_BLOCK = 512  # tokens compared with all others at once


@dataclass(frozen=True)
class PromptPlan:
    """One merging step of a batch of prompts.

    Attributes:
        front: padding tokens to put in front of every row before the step, see :meth:`pad`.
        plan: for rows of ``front + N`` tokens; kept tokens stay in order.
        removed: [B] tokens of each prompt that are gone.
    """

    front: int
    plan: MergePlan
    removed: Tensor

    def pad(self, values: Tensor, value: float = 0) -> Tensor:
        """Return values [B, N, ...] with ``front`` rows of ``value`` in front; sizes of padding are 0."""
        return F.pad(values, (*(0, 0) * (values.ndim - 2), self.front, 0), value=value)

    def gather(self, values: Tensor, value: float = 0) -> Tensor:
        """Return what [B, N] values, such as positions, are of the tokens that are kept."""
        return self.pad(values, value).gather(1, self.plan.kept)


def prompt_importance(
    query: Tensor, key: Tensor, prompt: Tensor, scale: float, *, size: Tensor | None = None, observers: int = LAST
) -> Tensor:
    """Score tokens by the attention that the last ones of their prompt pay to them.

    Args:
        query: [B, H, N, d] with their positions rotated in.
        key: [B, G, N, d] likewise; ``H`` is a multiple of ``G``.
        prompt: [B, N] bool, true on the tokens of the prompt, one run a row.
        scale: that products are multiplied by.
        size: [B, N, 1] words each token stands for; its logarithm is added. None means ones.
        observers: last tokens of the prompt that are asked; fewer where a prompt is shorter.

    Returns:
        [B, N] float32: mean over heads and observers, in [0, 1]; 0 off the prompt.
    """
    batch, heads, tokens, channels = query.shape
    observers = min(observers, tokens)
    start, end = _ends(prompt)
    asked = end[:, None] - observers + torch.arange(observers, device=prompt.device)  # [B, observers]
    there = asked >= start[:, None]
    index = asked.clamp(min=0)[:, None, :, None].expand(batch, heads, observers, channels)
    chosen = query.gather(2, index).unflatten(1, (key.shape[1], -1))  # [B, G, H / G, observers, d]
    logits = (chosen.float() @ key.float().transpose(-1, -2).unsqueeze(2)) * scale
    if size is not None:
        logits = logits + size.float().log().clamp(min=torch.finfo(torch.float32).min)[:, None, None, None, :, 0]
    places = torch.arange(tokens, device=prompt.device)
    seen = prompt[:, None, :] & (places <= asked[:, :, None])  # [B, observers, N]
    attention = logits.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
    attention = attention.masked_fill(~there[:, None, None, :, None], 0)  # of an observer before the prompt: NaN
    return attention.sum(3).mean((1, 2)) / there.sum(1).clamp(min=1)[:, None]


def tokens_to_remove(
    lengths: Tensor, keep: float, *, gone: Tensor | int = 0, halving: bool = False, first: int = FIRST, last: int = LAST
) -> Tensor:
    """Return [B]: how many tokens a prompt of each length loses.

    Args:
        lengths: [B] tokens of the prompts as they were given.
        keep: share of them that is left afterwards, in (0, 1].
        gone: [B] tokens that they lost before.
        halving: a token of every two may go at most, as ``"bipartite"`` pairs them.
        first: tokens at the beginning that stay.
        last: tokens at the end that stay.

    Raises:
        ValueError: for a share that is none, or negative numbers of tokens.

    >>> tokens_to_remove(torch.tensor([10, 100]), 0.5).tolist()
    [0, 50]
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share in (0, 1], got {keep}")
    if first < 0 or last < 1:
        raise ValueError(f"first must be at least 0 and last at least 1, got {first} and {last}")
    asked = (lengths.double() * (1 - keep) + 1e-9).floor().long() - gone  # 100 * (1 - 0.9) is 9.99...
    free = (lengths - gone - first - last).clamp(min=0)
    return asked.clamp(min=0).minimum(free // 2 if halving else free)


def match_prompt(
    scores: Tensor,
    prompt: Tensor,
    padding: Tensor,
    removed: Tensor,
    *,
    rule: str = "importance",
    partner: Tensor | None = None,
    first: int = FIRST,
    last: int = LAST,
) -> PromptPlan:
    """Choose the tokens of each prompt that go, and the token that each of them folds into.

    Args:
        scores: [B, N] from :func:`prompt_importance`; equal ones go from the front. Not read by ``"truncate"``. For
            ``"bipartite"`` from :func:`prompt_pairs`.
        prompt: [B, N] bool, true on the tokens of the prompt, one run a row.
        padding: [B, N] bool, true on tokens that stand for nothing; not on the prompt.
        removed: [B] tokens that each prompt loses, from :func:`tokens_to_remove`.
        rule: ``"importance"`` folds the lowest-scored tokens into the next that stays, ``"bipartite"`` into their
            partners; two controls leave out what they remove: ``"drop"`` the tokens of ``"importance"``,
            ``"truncate"`` the front of the prompt after its ``first`` tokens.
        partner: [B, N] place that each token would fold into, for ``"bipartite"``.
        first: tokens at the beginning of a prompt that stay.
        last: tokens at its end that stay.

    Returns:
        The plan. Sources come lowest score first, then padding; padding has a destination like a dropped token, and
        weight 0.

    Raises:
        ValueError: naming every argument whose shape, type or value cannot be used. What the masks hold is not
            looked at, which would make the host wait for the device.
    """
    problems = _problems(scores, prompt, padding, removed, rule, partner, first, last)
    if problems:
        raise ValueError("match_prompt: " + "; ".join(problems))
    batch, tokens = prompt.shape
    removed = removed.to(prompt.device)
    spare = padding.sum(1)
    least, most = torch.stack(((removed + spare).min(), removed.max())).tolist() if batch else (0, 0)
    shrink = min(least, max(tokens - 1, 0))  # one token stays, if of padding
    front = max(most - shrink, 0)
    prompt, padding = (F.pad(mask, (front, 0), value=value) for mask, value in ((prompt, False), (padding, True)))
    total, gone = tokens + front, shrink + front  # every row loses `gone` of `total`
    places = torch.arange(total, device=prompt.device).expand(batch, total)
    start, end = _ends(prompt)
    free = prompt & (places >= start[:, None] + first) & (places < end[:, None] - last)
    rank = places.float() if rule == "truncate" else F.pad(scores.float(), (front, 0)).nan_to_num(math.inf)
    # Free tokens by score, then padding from the front, then all others.
    order = rank.masked_fill(~free, math.inf).argsort(dim=1, stable=True)
    position = torch.empty_like(order).scatter_(1, order, places)  # of each token among the free ones
    merged = free & (position < removed[:, None])
    dropped = padding & (padding.cumsum(1) <= (gone - removed)[:, None])
    leaves = merged | dropped
    key = torch.where(merged, position, torch.where(dropped, total + places, 3 * total + places))
    source = key.argsort(1)[:, :gone]
    kept = torch.where(leaves, total + places, places).argsort(1)[:, : total - gone]
    stays = torch.where(leaves, total, places)  # its own place, or none
    following = stays.flip(1).cummin(1).values.flip(1)  # the next token that stays
    if rule == "bipartite":
        assert partner is not None
        own = F.pad(partner + front, (front, 0))
        following = torch.where(merged, own, following)
    # Of padding at the end, which has no next one: the last token that stays.
    destination = following.gather(1, source).minimum(kept[:, -1:]) if kept.shape[1] else source
    target = torch.searchsorted(kept.contiguous(), destination.contiguous()) if kept.shape[1] else source
    weight = torch.zeros(source.shape, device=source.device)
    if rule in ("importance", "bipartite"):
        weight = merged.gather(1, source).float()
    return PromptPlan(front, MergePlan(source, destination, kept, target, weight), removed)


def _ends(prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return [B] and [B]: the first place of each prompt and the one after its last."""
    places = torch.arange(1, prompt.shape[1] + 1, device=prompt.device)
    end = (prompt * places).amax(1) if prompt.shape[1] else prompt.sum(1)
    return end - prompt.sum(1), end


def prompt_pairs(key: Tensor, prompt: Tensor, *, first: int = FIRST, last: int = LAST) -> tuple[Tensor, Tensor]:
    """Pair tokens as ToMe does (arXiv 2210.09461, section 3): every other token with the one most like it.

    Modification: the partner comes later, so that no token learns of its future.

    Args:
        key: [B, G, N, d]; their mean over heads is compared, by cosine.
        prompt: [B, N] bool, true on the tokens of the prompt, one run a row.
        first: tokens at the beginning of a prompt that stay.
        last: tokens at its end that stay.

    Returns:
        Scores and partners for :func:`match_prompt`, [B, N] float32 and [B, N]. Score: one less similarity, and
        infinity for a token that does not fold.
    """
    batch, tokens = prompt.shape
    features = F.normalize(key.float().mean(1), dim=-1)
    start, end = _ends(prompt)
    places = torch.arange(tokens, device=prompt.device).expand(batch, tokens)
    free = (places >= start[:, None] + first) & (places < end[:, None] - last)
    within = places - start[:, None] - first  # parity counts from the prompt's own beginning: a batch changes nothing
    source, target = free & (within % 2 == 0), free & (within % 2 == 1)
    scores = torch.full((batch, tokens), math.inf, device=prompt.device)
    partner = places.clone()
    for begin in range(0, tokens, _BLOCK):  # no N x N matrix is held
        rows = slice(begin, min(begin + _BLOCK, tokens))
        alike = features[:, rows] @ features.transpose(1, 2)
        allowed = target[:, None, :] & (places[:, None, :] > places[:, rows, None])
        best, where = alike.masked_fill(~allowed, -math.inf).max(-1)
        scores[:, rows] = torch.where(source[:, rows], 1 - best, math.inf)
        partner[:, rows] = where
    return scores, partner


def _problems(
    scores: Tensor,
    prompt: Tensor,
    padding: Tensor,
    removed: Tensor,
    rule: str,
    partner: Tensor | None,
    first: int,
    last: int,
) -> list[str]:
    problems = []
    if rule not in RULES:
        problems.append(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if (partner is not None) != (rule == "bipartite"):
        problems.append("partner goes with rule 'bipartite'")
    if first < 0 or last < 1:
        problems.append(f"first must be at least 0 and last at least 1, got {first} and {last}")
    for name, mask in (("prompt", prompt), ("padding", padding)):
        if mask.ndim != 2 or mask.dtype != torch.bool or mask.shape != scores.shape:
            found = f"{mask.dtype} {list(mask.shape)}"
            problems.append(f"{name} must be bool like scores, {list(scores.shape)}, got {found}")
    if removed.shape != scores.shape[:1] or removed.is_floating_point():
        problems.append(f"removed must be whole numbers [B], got {removed.dtype} {list(removed.shape)}")
    return problems

"""Folding prompts: who goes, who takes what goes, and that a row does not depend on its neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyra import merge_tokens
from pyra.prompt_matching import (
    RULES,
    PromptPlan,
    match_prompt,
    prompt_importance,
    prompt_pairs,
    tokens_to_remove,
)

Layout = tuple[int, int, int, int]  # padding, prompt, answer, padding


def masks(*rows: Layout) -> tuple[Tensor, Tensor]:
    """Return prompt and padding masks of rows of equal length."""
    prompt = [[False] * a + [True] * p + [False] * (c + b) for a, p, c, b in rows]
    padding = [[True] * a + [False] * (p + c) + [True] * b for a, p, c, b in rows]
    return torch.tensor(prompt), torch.tensor(padding)


def merged(plan: PromptPlan, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    size = plan.pad((~padding).float()[..., None])
    return merge_tokens(plan.pad(x), size, plan.plan)


def real(x: Tensor, size: Tensor) -> list[Tensor]:
    """The rows without their padding."""
    return [row[mask] for row, mask in zip(x, size[..., 0] > 0, strict=True)]


def test_the_lowest_scored_fold_into_the_next_that_stays() -> None:
    prompt, padding = masks((0, 6, 0, 0))
    scores = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.4, 0.0]])
    plan = match_prompt(scores, prompt, padding, torch.tensor([2]), last=1)
    assert plan.front == 0 and plan.plan.kept.tolist() == [[0, 1, 4, 5]]
    assert plan.plan.source.tolist() == [[2, 3]] and plan.plan.destination.tolist() == [[4, 4]]
    x = torch.arange(6.0).view(1, 6, 1)
    values, size = merged(plan, x, padding)
    assert values.flatten().tolist() == [0, 1, 3, 5] and size.flatten().tolist() == [1, 1, 3, 1]
    assert plan.gather(torch.arange(6)[None]).tolist() == [[0, 1, 4, 5]]  # positions are those of the survivors


@pytest.mark.parametrize(("rule", "kept"), [("drop", [0, 1, 4, 5]), ("truncate", [0, 3, 4, 5])])
def test_controls_leave_out_what_they_remove(rule: str, kept: list[int]) -> None:
    prompt, padding = masks((0, 6, 0, 0))
    scores = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.4, 0.0]])
    plan = match_prompt(scores, prompt, padding, torch.tensor([2]), rule=rule, last=1)
    values, size = merged(plan, torch.arange(6.0).view(1, 6, 1), padding)
    assert values.flatten().tolist() == kept and size.flatten().tolist() == [1] * 4


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 8)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows=rows, keep=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]), rule=st.sampled_from(RULES), seed=st.integers(0, 9))
def test_a_row_of_a_batch_is_what_it_is_alone(
    rows: list[tuple[int, int, int]], keep: float, rule: str, seed: int
) -> None:
    length = max(sum(row) for row in rows) or 1
    prompt, padding = masks(*((a, p, c, length - a - p - c) for a, p, c in rows))
    generator = torch.Generator().manual_seed(seed)
    x, scores = (
        torch.randn(len(rows), length, 3, generator=generator),
        torch.rand(len(rows), length, generator=generator),
    )
    removed = tokens_to_remove(prompt.sum(1), keep, last=4, halving=rule == "bipartite")
    partner = None
    if rule == "bipartite":
        scores, partner = prompt_pairs(x[:, None], prompt, last=4)
    plan = match_prompt(scores, prompt, padding, removed, rule=rule, partner=partner, last=4)
    values, size = merged(plan, x, padding)
    together = real(values, size)
    place = real(plan.gather(torch.arange(length).expand_as(prompt))[..., None], size)
    for index, (a, p, c) in enumerate(rows):
        if not p + c:
            assert len(together[index]) == 0
            continue
        own = slice(a, a + p + c)
        alone = match_prompt(
            scores[index : index + 1, own],
            *(mask[index : index + 1, own] for mask in (prompt, padding)),
            removed[index : index + 1],
            rule=rule,
            partner=None if partner is None else partner[index : index + 1, own] - a,
            last=4,
        )
        assert alone.front == 0 and alone.plan.removed == removed[index]
        expected, sizes = merged(alone, x[index : index + 1, own], padding[index : index + 1, own])
        assert torch.equal(together[index], expected[0])
        if rule in ("importance", "bipartite"):
            assert sizes.sum() == p + c  # every word is counted once
        kept = (place[index][:, 0] - a).tolist()
        assert kept == sorted(kept) == alone.plan.kept[0].tolist()
        assert {*range(min(1, p)), *range(max(p - 4, 0), p + c)} <= set(kept)  # first, last, answer
        assert (alone.plan.destination > alone.plan.source).all()  # nobody learns of the future
    # The batch is as short as its longest row.
    assert values.shape[1] == max(1, *(len(row) for row in together))
    assert plan.plan.kept.gather(1, plan.plan.target).equal(plan.plan.destination)


def test_pairs_are_the_most_alike_of_every_other_token_and_later_ones() -> None:
    torch.manual_seed(0)
    key = torch.randn(1, 2, 40, 8)
    prompt, _ = masks((3, 30, 7, 0))
    scores, partner = prompt_pairs(key, prompt, last=4)
    mean = torch.nn.functional.normalize(key.double().mean(1)[0], dim=-1)
    free = list(range(4, 29))
    for place in range(40):
        later = [other for other in free[1::2] if other > place]
        if place not in free[::2] or not later:
            assert scores[0, place] == math.inf
            continue
        best = max(later, key=lambda other: float(mean[place] @ mean[other]))
        assert partner[0, place] == best
        assert float(scores[0, place]) == pytest.approx(1 - float(mean[place] @ mean[best]), abs=1e-6)


def test_shares_are_of_the_prompt_as_it_was_given() -> None:
    lengths, gone = torch.tensor([100, 40, 10]), torch.tensor([50, 10, 0])
    assert tokens_to_remove(lengths, 0.25, gone=gone).tolist() == [25, 13, 0]  # 13: 17 of 40 never go
    assert tokens_to_remove(lengths, 0.6, gone=gone).tolist() == [0, 6, 0]
    assert tokens_to_remove(lengths, 0.25, gone=gone, halving=True).tolist() == [16, 6, 0]


def test_padding_is_added_where_a_batch_has_too_little() -> None:
    """One long prompt beside a long answer: the first loses 20 tokens, the second none, and neither has padding."""
    prompt, padding = masks((0, 40, 0, 0), (0, 5, 35, 0))
    plan = match_prompt(torch.rand(2, 40), prompt, padding, torch.tensor([20, 0]))
    assert plan.front == 20 and plan.plan.kept.shape == (2, 40)
    values, size = merged(plan, torch.randn(2, 40, 3), padding)
    assert [len(row) for row in real(values, size)] == [20, 40]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_importance_is_the_attention_of_the_last_tokens(groups: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, groups, 20, 8)
    prompt, _ = masks((3, 12, 5, 0), (0, 2, 18, 0))
    found = prompt_importance(query, key, prompt, 0.3, observers=4)
    keys = key.double().repeat_interleave(4 // groups, 1)
    for row, (start, end) in enumerate([(3, 15), (0, 2)]):
        asked = range(max(end - 4, start), end)
        attention = torch.zeros(20, dtype=torch.float64)
        for place in asked:
            products = torch.einsum("hd,htd->ht", query[row, :, place].double(), keys[row, :, start : place + 1]) * 0.3
            attention[start : place + 1] += products.softmax(-1).mean(0) / len(asked)
        assert torch.allclose(found[row].double(), attention, atol=1e-6)


def test_importance_counts_the_words_of_a_token() -> None:
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    prompt = torch.tensor([[False, True, True, True]])
    found = prompt_importance(query, key, prompt, 1.0, size=torch.tensor([[[0], [2], [1], [1]]]), observers=1)
    assert found.tolist() == [[0, 0.5, 0.25, 0.25]]


def test_rows_without_a_prompt_score_nothing() -> None:
    prompt = torch.zeros(1, 4, dtype=torch.bool)
    assert prompt_importance(torch.randn(1, 2, 4, 2), torch.randn(1, 2, 4, 2), prompt, 1.0).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("length", "keep", "gone"),
    [(100, 0.5, 50), (100, 0.9, 10), (100, 0.01, 83), (17, 0.5, 0), (19, 0.1, 2), (0, 0.5, 0)],
)
def test_how_many_go(length: int, keep: float, gone: int) -> None:
    assert tokens_to_remove(torch.tensor([length]), keep).tolist() == [gone]


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_shares_that_are_none(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be a share"):
        tokens_to_remove(torch.tensor([10]), keep)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "merge"}, "rule must be one of importance, bipartite, drop, truncate, got 'merge'"),
        ({"rule": "bipartite"}, "partner goes with rule 'bipartite'"),
        ({"last": 0}, "last at least 1"),
        ({"removed": torch.tensor([1.0])}, "removed must be whole numbers"),
        ({"prompt": torch.ones(1, 21, dtype=torch.bool)}, "prompt must be bool like scores"),
    ],
)
def test_arguments_that_cannot_be_used(changes: dict[str, Tensor], said: str) -> None:
    prompt, padding = masks((1, 20, 1, 0))
    given = {"prompt": prompt, "padding": padding, "removed": torch.tensor([1])}
    with pytest.raises(ValueError, match=said):
        match_prompt(torch.rand(1, 22), **{**given, **changes})

"""A schedule by what merging disturbs: measured on unlabelled images, distributed over the layers under a budget.

Measured, for each layer alone: how far the model's features move when this layer merges a share of its tokens and no
other layer does (their *drift*: the norm of the change over the norm of the features, mean over images), and how
similar the pairs are that it merges.

Rule: the schedule whose drifts, each to the power 1.5, have the smallest sum within the budget. A layer that tokens
merged before is taken to drift as much as at the same share of all tokens: so every share a layer can merge, up to a
half, was measured, and nothing is extrapolated. Changes of one direction would add up (power 1), independent ones add
in squares (power 2); the power lies between them (:data:`POWER`). For a price per unit of cost (the Lagrangian) the
best schedule is a shortest path over the tokens that are left after each layer, found exactly; the price is the lowest
that keeps the budget, and what is then left of the budget is given back a token at a time, where that lowers the sum
most for its cost. None of it is random.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyra.backbones import geometry, wrap
from pyra.backbones.layers import KeyReader, MergingLayer, TokenStream, merging_layers
from pyra.config import PyraConfig
from pyra.cost import Geometry, token_counts
from pyra.errors import ConfigError, DataError, ScheduleError
from pyra.kernels.match import Rules, match
from pyra.matching import removable
from pyra.tasks.schedules.costs import Costs, Values, private_copy, total
from pyra.tasks.schedules.latency import UnreachableError

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of its tokens, without prefix tokens, that a layer merges in the measurement."""

POWER = 1.5
"""Little tells powers apart: at ten pairs of rate (0.3 to 0.7) and task (Caltech101, CIFAR-10; a DINOv2-S tuned for
saliency, 64 training images apart from the 32 measured) the schedules of 1.5 drifted less than the solver's nine times,
those of 1 and of 2 eight times, those of 3 five times; at rate 0.4 of Caltech101 none did."""

Features = Callable[[nn.Module, Tensor], Tensor]
_PRICES = 60  # bisection steps for the price: until two prices lead to the same schedule


@dataclass(frozen=True)
class Calibration:
    """What merging in one layer alone disturbs.

    Attributes:
        geometry: sizes of the backbone.
        shares: of the tokens, rising, at most a half.
        drift: [layer][share], relative change of the features.
        similarity: [layer][share], mean cosine similarity of the least similar pair that merges.
        images: how many were looked at.
    """

    geometry: Geometry
    shares: tuple[float, ...]
    drift: tuple[tuple[float, ...], ...]
    similarity: tuple[tuple[float, ...], ...]
    images: int

    def of_layer(self, layer: int, tokens: int) -> Values:
        """Drift ** :data:`POWER` of a layer that ``tokens`` tokens enter, for each ``r``; more never drifts less."""
        free = tokens - self.geometry.prefix_tokens
        removed = np.arange(removable(tokens, self.geometry.prefix_tokens) + 1)
        rising = np.maximum.accumulate([0.0, *self.drift[layer]])
        found: Values = np.interp(removed / max(free, 1), [0.0, *self.shares], rising) ** POWER
        return found


def total_drift(calibration: Calibration, schedule: Sequence[int]) -> float:
    """Return what the rule makes smallest: the sum over a schedule's layers of drift ** :data:`POWER`."""
    counts = token_counts(calibration.geometry, schedule)
    return sum(float(calibration.of_layer(layer, counts[layer])[removed]) for layer, removed in enumerate(schedule))


def calibrate(
    model: nn.Module,
    images: Tensor,
    config: PyraConfig,
    *,
    shares: Sequence[float] = SHARES,
    batch_size: int = 16,
    features: Features | None = None,
) -> Calibration:
    """Measure what merging disturbs, layer by layer.

    Args:
        model: a supported backbone, wrapped or not; it stays as it is.
        images: [M, 3, H, W], normalised, on its device; no labels are needed.
        config: how tokens are matched; its rate or schedule is not read, and re-activation left out.
        shares: of the tokens a layer merges, rising within (0, 1/2].
        batch_size: images a forward.
        features: from model and images [B, 3, H, W] to [B, C]; :func:`pooled_features` by default.

    Raises:
        ConfigError: for shares that do not rise within (0, 1/2].
        ScheduleError: where nothing can merge.
        DataError: without images, or where the features are not finite.
    """
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] <= 0.5:
        raise ConfigError(f"shares must rise within (0, 1/2], got {tuple(shares)}")
    if not len(images):
        raise DataError("a calibration needs at least one image")
    features = features or pooled_features
    sizes = geometry(model, (int(images.shape[-2]), int(images.shape[-1])))
    free = sizes.tokens - sizes.prefix_tokens
    steps = [max(1, math.floor(share * free)) for share in shares]
    if removable(sizes.tokens, sizes.prefix_tokens) < 1:
        raise ScheduleError(f"nothing can merge: {sizes.tokens} tokens, {sizes.prefix_tokens} of them prefix tokens")
    config = replace(config, reactivation=False, scaled_gates=False, rate=None, rate_range=None, schedule=[0])
    similarity = pair_similarity(model, images, config, batch_size)
    merging = private_copy(model)
    drift = np.zeros((sizes.depth, len(shares)))
    with tqdm(total=len(images) * (1 + drift.size), desc="calibrating", unit="image", leave=False, disable=None) as bar:
        plain = [features(merging, part) for part in _batches(images, batch_size, bar)]
        if not all(bool(torch.isfinite(part).all()) for part in plain):
            raise DataError("the model's features of the calibration images are not finite")
        for layer in range(sizes.depth):
            for column, removed in enumerate(steps):
                schedule = [removed if index == layer else 0 for index in range(sizes.depth)]
                wrap(merging, replace(config, schedule=schedule))
                moved = [features(merging, part) for part in _batches(images, batch_size, bar)]
                drift[layer, column] = relative_change(torch.cat(moved), torch.cat(plain))
    return Calibration(
        sizes,
        tuple(step / free for step in steps),
        tuple(tuple(map(float, row)) for row in drift),
        tuple(tuple(float(row[step - 1]) for step in steps) for row in similarity),
        len(images),
    )


def relative_change(moved: Tensor, plain: Tensor) -> float:
    """Return the norm of the change over the norm of the features [M, C], mean over the rows."""
    change = (moved - plain).float().norm(dim=1) / plain.float().norm(dim=1).clamp(min=1e-12)
    return float(change.mean())


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the head of a model sees of images [B, 3, H, W], [B, C]; of others than timm's their main output."""
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with torch.inference_mode():
        if hasattr(plain, "forward_head"):
            found: Tensor = plain.forward_head(plain.forward_features(images), pre_logits=True)
            return found
        output = plain(images)
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                output = getattr(output, name)
                break
        return output.mean(1) if output.ndim == 3 else output


def pair_similarity(model: nn.Module, images: Tensor, config: PyraConfig, batch_size: int = 16) -> list[Tensor]:
    """Return for each layer the cosine similarity of its pairs where nothing merged before, best first.

    Arguments are those of :func:`calibrate`.

    Returns:
        For each layer a tensor with as many values as it can merge, means over the images.
    """
    sizes = geometry(model, (int(images.shape[-2]), int(images.shape[-1])))
    every = replace(config, schedule=[1] + [0] * (sizes.depth - 1), rate=None, rate_range=None, reactivation=False)
    looking = wrap(private_copy(model), every)
    sums: list[Tensor] = [torch.zeros(())] * sizes.depth
    for layer in merging_layers(looking):
        layer.merge = functools.partial(_look, layer, sums)  # type: ignore[method-assign]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pooled_features(looking, images[start : start + batch_size])
    return [found / len(images) for found in sums]


def _look(
    layer: MergingLayer, sums: list[Tensor], stream: TokenStream, attention: KeyReader, padded: bool = False
) -> TokenStream:
    """Match as the layer would, keep the similarities, merge nothing."""
    step = layer.step
    keys, heads = attention.keys()
    count = stream.tokens.shape[1]
    rules = Rules(
        order=step.config.order,
        method=step.config.matching,
        margin=0.9 - 0.9 * step.layer / step.depth,
        grid_width=step.grid_width(count),
        window=step.config.window,
    )
    matched = match(keys, heads, removable(count, step.prefix), step.prefix, rules)
    best_first = matched.similarity.float().sort(dim=1, descending=True).values
    sums[step.layer] = sums[step.layer] + best_first.sum(0).cpu()
    return stream


def distribute(calibration: Calibration, costs: Costs, budget: float) -> list[int]:
    """Return the schedule that disturbs least (:func:`total_drift`) of those whose cost is within a budget.

    Args:
        calibration: of the model.
        costs: of its layers, of the same geometry.
        budget: in the unit of the costs: MACs, or seconds.

    Returns:
        Tokens to remove in each block. None of them could merge a block later, or the last of a block not at all,
        within the budget (with measured costs: not at a higher cost).

    Raises:
        UnreachableError: where no schedule is within the budget.
    """
    sizes = costs.geometry
    if total(costs, [0] * sizes.depth) <= budget:
        return [0] * sizes.depth
    paths = _Paths(calibration, costs)
    cheapest = paths.shortest(math.inf)
    if total(costs, cheapest) > budget:
        raise UnreachableError(total(costs, cheapest), budget)
    low, high, schedule = 0.0, 1.0, cheapest
    while total(costs, paths.shortest(high)) > budget and high < 2.0**_PRICES:
        low, high = high, 2 * high
    too_much = paths.shortest(low)
    for _ in range(_PRICES):
        price = (low + high) / 2
        found = paths.shortest(price)
        if total(costs, found) <= budget:
            high, schedule = price, found
        else:
            low, too_much = price, found
        if schedule == too_much:
            break
    return give_back(calibration, costs, budget, schedule)


class _Paths:
    """Shortest paths over the tokens left after each layer; the length of a step is drift plus price times cost."""

    def __init__(self, calibration: Calibration, costs: Costs) -> None:
        self.sizes = costs.geometry
        counts = range(self.sizes.prefix_tokens, self.sizes.tokens + 1)
        layers = range(self.sizes.depth)
        self.drift = [{count: calibration.of_layer(layer, count) for count in counts} for layer in layers]
        self.cost = [{count: costs.of_layer(layer, count) for count in counts} for layer in layers]
        plain = total(costs, [0] * self.sizes.depth)
        most = max(float(table[self.sizes.tokens].max()) for table in self.drift)
        self.unit = (most or 1.0) / plain  # a price of 1 weighs the whole cost as the largest drift

    def shortest(self, price: float) -> list[int]:
        """Return the best schedule for a price, of equals the least merging; an infinite one sees the cost alone."""
        sizes = self.sizes
        ahead = np.zeros(sizes.tokens + 1)  # what the layers still ahead cost, for each count that enters them
        choices: list[dict[int, int]] = []
        for layer in reversed(range(sizes.depth)):
            here, choice = np.zeros_like(ahead), {}
            for count, cost in self.cost[layer].items():
                step = cost if math.isinf(price) else self.drift[layer][count] + price * self.unit * cost
                lengths = step + ahead[count - np.arange(len(step))]
                choice[count] = int(lengths.argmin())
                here[count] = lengths[choice[count]]
            ahead = here
            choices.append(choice)
        schedule, tokens = [], sizes.tokens
        for choice in reversed(choices):
            schedule.append(choice[tokens])
            tokens -= schedule[-1]
        return schedule


def give_back(calibration: Calibration, costs: Costs, budget: float, schedule: Sequence[int]) -> list[int]:
    """Merge less, a token at a time, as long as the budget holds; first where that lowers the drift most for its cost.

    Arguments are those of :func:`distribute`, and a schedule within the budget.
    """
    current = list(schedule)
    cost, drift = total(costs, current), total_drift(calibration, current)
    while True:
        best: tuple[float, list[int], float, float] | None = None
        for candidate in _later(current, costs.geometry):
            dearer, calmer = total(costs, candidate), total_drift(calibration, candidate)
            if dearer > budget:
                continue
            gain = (drift - calmer) / (dearer - cost) if dearer > cost else math.inf if calmer <= drift else -math.inf
            if best is None or gain > best[0]:
                best = gain, candidate, dearer, calmer
        if best is None or best[0] == -math.inf:
            return current
        _, current, cost, drift = best


def _later(schedule: list[int], sizes: Geometry) -> Iterator[list[int]]:
    """Yield the schedules in which one token merges in a later block, or not at all."""
    for block, removed in enumerate(schedule):
        if not removed:
            continue
        for later in range(block + 1, len(schedule) + 1):
            moved = list(schedule)
            moved[block] -= 1
            if later < len(schedule):
                moved[later] += 1
                counts = token_counts(sizes, moved)
                if moved[later] > removable(counts[later], sizes.prefix_tokens):
                    continue
            yield moved


def _batches(images: Tensor, batch_size: int, bar: Any) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        yield part
        bar.update(len(part))

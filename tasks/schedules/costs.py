"""What each layer costs at any number of tokens: counted (MACs), or measured on this device (seconds).

A layer's cost depends on the tokens that enter it and on how many of them it merges away; a schedule costs the sum over
its layers and what does not depend on it (:func:`total`). Solvers know no more of a model than this.

Letters: ``N`` tokens that enter a layer, ``N0`` tokens at the first layer, ``r`` tokens removed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from pyra.backbones import geometry, locate, unwrap, wrap
from pyra.backbones.layers import MergingLayer, TokenStream, give_reactivation, merging_layers
from pyra.config import PyraConfig
from pyra.cost import Geometry, token_counts
from pyra.errors import ScheduleError
from pyra.matching import removable
from pyra.tasks.timing import Job, forward, spreads

Values = NDArray[np.float64]
POINTS = 6
"""Token counts at which a layer is timed."""


class Costs(Protocol):
    """What a schedule costs, in any unit."""

    @property
    def geometry(self) -> Geometry:
        """Sizes of the backbone."""

    @property
    def fixed(self) -> float:
        """Cost of everything but the layers."""

    def of_layer(self, layer: int, tokens: int) -> Values:
        """Cost of a layer that ``tokens`` tokens enter, for each ``r`` from 0 to the most that can go."""


def total(costs: Costs, schedule: Sequence[int]) -> float:
    """Return the cost of a schedule, which fits."""
    counts = token_counts(costs.geometry, schedule)
    return costs.fixed + sum(
        float(costs.of_layer(layer, counts[layer])[removed]) for layer, removed in enumerate(schedule)
    )


@dataclass(frozen=True)
class CountedCosts:
    """MACs; :func:`total` is :func:`pyra.cost.geometry_macs`."""

    geometry: Geometry

    @property
    def fixed(self) -> float:
        """MACs before and after the layers."""
        return self.geometry.embedding_macs + self.geometry.pooling_macs

    def of_layer(self, layer: int, tokens: int) -> Values:
        """MACs of a layer, for each ``r``."""
        sizes = self.geometry
        projections = sizes.projection_macs
        if projections is None:
            projections = 4 * sizes.dim * sizes.attention_dim
        left = tokens - np.arange(removable(tokens, sizes.prefix_tokens) + 1, dtype=np.float64)
        return tokens * projections + 2 * tokens * tokens * sizes.attention_dim + left * sizes.mlp_macs


@dataclass(frozen=True)
class LayerTimes:
    """Seconds that layers of one shape take for one batch.

    Each triple is for removing none of the tokens, one, and as many as can go: matching costs as soon as one goes, and
    from there on merging costs, and the MLP saves, by the token.

    Attributes:
        layers: which have this shape.
        tokens: rising token counts at which it was timed.
        merged: a triple for each of them, where tokens carry sizes: an earlier layer merged.
        first: the triple at ``N0`` tokens without sizes: nothing merged so far.
    """

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    merged: tuple[tuple[float, float, float], ...]
    first: tuple[float, float, float]

    def scaled(self, factor: float) -> LayerTimes:
        """Return the times multiplied by a factor."""
        merged = tuple((a * factor, b * factor, c * factor) for a, b, c in self.merged)
        none, one, most = self.first
        return replace(self, merged=merged, first=(none * factor, one * factor, most * factor))


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds of one forward of a batch on one device; between the token counts that were timed, linear.

    Attributes:
        geometry: sizes of the backbone.
        fixed: seconds of everything but the layers.
        times: of the layers, one entry a shape.
        batch_size: images in the forward.
        scale: what the parts were multiplied with so that those of the plain model add up to its own time: layers that
            are timed alone find their weights in the cache.
    """

    geometry: Geometry
    fixed: float
    times: tuple[LayerTimes, ...]
    batch_size: int
    scale: float

    @functools.cached_property
    def plain(self) -> float:
        """Seconds of the unwrapped model."""
        return total(self, [0] * self.geometry.depth)

    def of_layer(self, layer: int, tokens: int) -> Values:
        """Seconds of a layer, for each ``r``."""
        found = next(times for times in self.times if layer in times.layers)
        if tokens == self.geometry.tokens:
            none, one, most = found.first
        else:
            none, one, most = (
                float(np.interp(tokens, found.tokens, [triple[part] for triple in found.merged])) for part in range(3)
            )
        can_go = removable(tokens, self.geometry.prefix_tokens)
        return np.concatenate([[none], np.linspace(one, most, can_go)]) if can_go else np.array([none])


def measure_costs(
    model: nn.Module, images: Tensor, config: PyraConfig, *, points: int = POINTS, rounds: int = 9
) -> MeasuredCosts:
    """Time the layers of a model at several token counts, in turns with the whole model.

    Args:
        model: a supported backbone, wrapped or not; it stays as it is.
        images: [B, 3, H, W] on its device, of the size that schedules are for.
        config: how tokens are merged; its rate or schedule is not read.
        points: token counts for each shape of layer, from ``N0`` down to two patches, at equal ratios.
        rounds: timed turns; the lower fifth counts, as what else a machine does only adds.

    Raises:
        ScheduleError: where the model has too few tokens to merge any.
    """
    model = private_copy(model)
    sizes = geometry(model, (int(images.shape[-2]), int(images.shape[-1])))
    if not removable(sizes.tokens, sizes.prefix_tokens):
        raise ScheduleError(f"nothing can merge: {sizes.tokens} tokens, {sizes.prefix_tokens} of them prefix tokens")
    merging = replace(config, schedule=[1] + [0] * (sizes.depth - 1), rate=None, rate_range=None)
    groups = shapes_of(model)
    entering = _entering(model, images)
    shells = list(merging_layers(wrap(private_copy(model), merging)))
    tokens = token_grid(sizes, points)
    jobs: dict[str, Job] = {"whole": forward(model, images), "rest": forward(without_layers(model), images)}
    for shape, group in enumerate(groups):
        layer, (first, more, named) = shells[group[0]], entering[group[0]]
        if config.reactivation:
            give_reactivation(layer, removable(sizes.tokens, sizes.prefix_tokens))
        for count in tokens:
            for part, removed in enumerate(_steps(count, sizes)):
                stream = _merged_stream(first, count)
                jobs[f"{shape}/{count}/{part}"] = _layer_job(layer, removed, stream, more, named)
        for part, removed in enumerate(_steps(sizes.tokens, sizes)):
            jobs[f"{shape}/first/{part}"] = _layer_job(layer, removed, TokenStream(first), more, named)
    with tqdm(total=(rounds + 1) * len(jobs), desc="timing layers", unit="turn", leave=False, disable=None) as bar:
        ticking = {name: _ticking(job, bar) for name, job in jobs.items()}
        seconds = {name: spread.p20 for name, spread in spreads(ticking, rounds, device=images.device).items()}
    times = [
        LayerTimes(
            tuple(group),
            tokens,
            _rising([_triple(seconds, f"{shape}/{count}") for count in tokens]),
            _triple(seconds, f"{shape}/first"),
        )
        for shape, group in enumerate(groups)
    ]
    parts = seconds["rest"] + sum(len(each.layers) * each.first[0] for each in times)
    scale = seconds["whole"] / parts
    scaled = tuple(each.scaled(scale) for each in times)
    return MeasuredCosts(sizes, seconds["rest"] * scale, scaled, len(images), scale)


def private_copy(model: nn.Module) -> nn.Module:
    """Return an unwrapped copy in evaluation mode that shares every tensor with the model."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return unwrap(copy.deepcopy(model, shared)).eval()


def shapes_of(model: nn.Module) -> list[list[int]]:
    """Return the layers of a plain model, those of one shape together, in order."""
    groups: dict[object, list[int]] = {}
    family, core = locate(model)
    for index, layer in enumerate(family.layers(core)):
        weights = tuple((name, tuple(weight.shape), weight.dtype) for name, weight in layer.named_parameters())
        groups.setdefault((type(layer), weights), []).append(index)
    return list(groups.values())


def token_grid(sizes: Geometry, points: int) -> tuple[int, ...]:
    """Return rising token counts from two patches to all of them, at equal ratios."""
    patches = sizes.tokens - sizes.prefix_tokens
    grid = np.geomspace(min(2, patches), patches, max(points, 2))
    return tuple(sorted({sizes.prefix_tokens + round(float(count)) for count in grid}))


class _Passing(nn.Module):
    """A layer that hands on what enters it."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def without_layers(model: nn.Module) -> nn.Module:
    """Return a copy of a plain model in which no layer does anything."""
    emptied = private_copy(model)
    family, core = locate(emptied)
    found = family.layers(core)
    for index in range(len(found)):
        found[index] = _Passing()
    return emptied


def _entering(model: nn.Module, images: Tensor) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """Return what each layer of a plain model gets: tokens [B, N0, C], and its further arguments."""
    family, core = locate(model)
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        first = positional[0] if positional else named.pop("hidden_states")
        seen.append((first, positional[1:], named))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in family.layers(core)]
    try:
        forward(model, images)()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _merged_stream(tokens: Tensor, count: int) -> TokenStream:
    """Return a stream as an earlier layer leaves it, of the first ``count`` tokens."""
    batch, entered = tokens.shape[:2]
    places = torch.arange(entered, device=tokens.device).expand(batch, -1)
    with torch.inference_mode():
        size = torch.ones(batch, count, 1, dtype=torch.int32, device=tokens.device)
        size[:, -1] += entered - count
        return TokenStream(
            tokens[:, :count].contiguous(), size, places.clamp(max=count - 1), places[:, :count].contiguous()
        )


def _steps(count: int, sizes: Geometry) -> tuple[int, int, int]:
    most = removable(count, sizes.prefix_tokens)
    return 0, min(1, most), most


def _layer_job(
    layer: MergingLayer, removed: int, stream: TokenStream, more: tuple[Any, ...], named: dict[str, Any]
) -> Job:
    step = replace(layer.step, removed=removed)

    def run() -> None:
        layer.step = step
        with torch.inference_mode():
            layer(stream, *more, **named)

    return run


def _ticking(job: Callable[[], object], bar: Any) -> Job:
    def run() -> None:
        job()
        bar.update()

    return run


def _rising(triples: list[tuple[float, float, float]]) -> tuple[tuple[float, float, float], ...]:
    """Return the triples with none above that of a larger token count: where one is, something disturbed it."""
    bounded = np.minimum.accumulate(np.array(triples)[::-1], axis=0)[::-1]
    return tuple((float(none), float(one), float(most)) for none, one, most in bounded)


def _triple(seconds: dict[str, float], name: str) -> tuple[float, float, float]:
    none, one, most = (seconds[f"{name}/{part}"] for part in range(3))
    return none, one, most

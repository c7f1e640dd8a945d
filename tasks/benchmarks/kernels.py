"""Matching, merging and attention of one layer: against plain PyTorch, eager and compiled, and against a copy.

Shapes are those of a model's first layer that merges at the published high schedule. Nothing is timed before every
kernel has passed its check (:mod:`pyra.kernels.checks`) on these shapes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.attention import proportional
from pyra.errors import KernelError
from pyra.kernels import checks, match, merge
from pyra.kernels.match import Rules
from pyra.kernels.merge import Plan, Weights
from pyra.reactivation import Reactivation
from pyra.step import merge_step
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.benchmarks.subject import Subject
from pyra.tasks.timing import Job, Spread, graphed, spreads

RULES = Rules("grouped", "bipartite", 0.5, None, 1)
SUBJECTS = (
    *(Subject(f"vit_{size}_patch16_{side}", side) for size in ("base", "large") for side in (224, 384)),
    *(Subject("vit_small_patch14_dinov2", side) for side in (224, 518)),
)
STEP_GOAL = 5.0  # times faster than eager, at the largest batch on a GPU
COPY_GOAL = 0.6  # share of a copy's bandwidth that merging reaches there
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes
CHECKED_BATCH = 2
GRAPHED = "triton, graphed"  # from a CUDA graph: what the GPU takes, not what the host takes to ask it


@dataclass(frozen=True)
class Shape:
    """What one layer merges.

    Attributes:
        backbone: timm name.
        image_size: image side in pixels.
        tokens: ``N``.
        prefix: leading tokens that never merge.
        heads: ``H``.
        head_dim: ``d``.
        removed: ``r``.
    """

    backbone: str
    image_size: int
    tokens: int
    prefix: int
    heads: int
    head_dim: int
    removed: int

    @classmethod
    def of(cls, subject: Subject) -> Shape:
        """Return the first merging layer of a model at the high schedule."""
        sizes, schedules = subject.shapes()
        return cls(
            subject.backbone,
            subject.side(),
            sizes.tokens,
            sizes.prefix_tokens,
            sizes.attention_dim // sizes.head_dim,
            sizes.head_dim,
            next(removed for removed in schedules["high"] if removed),
        )

    def drawn(self, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Weights]:
        """Draw keys, tokens, sizes and re-activation weights (:func:`pyra.kernels.checks.drawn`)."""
        return checks.drawn(batch, self.tokens, self.heads, self.head_dim, self.removed, device, dtype)


def check(shapes: Sequence[Shape], device: torch.device) -> None:
    """Run every kernel once on every shape, in float32 and bfloat16, forward and backward.

    On a CPU that is Triton's interpreter, in a process of its own.

    Raises:
        KernelError: with all that is wrong.
    """
    problems = _problems(shapes, device) if device.type == "cuda" else _interpreted_problems(shapes)
    if problems:
        raise KernelError(f"the kernels failed their check, so nothing was timed: {'; '.join(problems)}")


def _interpreted_problems(shapes: Sequence[Shape]) -> list[str]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton loads, in the process that is started here
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_problems, shapes, torch.device("cpu")).result()
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _problems(shapes: Sequence[Shape], device: torch.device) -> list[str]:
    return [
        f"{shape.backbone} at {shape.image_size} px, {str(dtype).removeprefix('torch.')}: {problem}"
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for problem in _problems_of(shape, device, dtype)
    ]


def _problems_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    keys, x, size, weights = shape.drawn(CHECKED_BATCH, device, dtype)
    yield from checks.match_problems(keys, shape.removed, shape.prefix, RULES)
    plan = _plan(shape, keys)
    yield from checks.merge_problems(x, size, plan, weights, backward=True)
    yield from checks.follow_problems(size, plan, dtype)
    if dtype == torch.bfloat16:
        yield from checks.attend_problems(keys, size)


def _plan(shape: Shape, keys: Tensor) -> Plan:
    return Plan(*match.reference(keys, 1, shape.removed, shape.prefix, RULES, None)[:4], None)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Measure bytes a second, read and written, of a copy within the device's memory."""
    source = torch.randint(0, 127, (COPIED[device.type],), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / spreads({"copy": lambda: target.copy_(source)}, rounds, 2, device)["copy"].p50


@dataclass(frozen=True)
class Measure:
    """One operation: its jobs by implementation, ours first, and what it has to move at least."""

    name: str
    jobs: dict[str, Job]
    bytes_moved: int


def measures(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Measure]:
    """Return what is timed for one shape; the kernels are run by name: they have passed their check."""
    keys, x, size, weights = shape.drawn(batch, device, dtype)
    backend = "triton" if device.type == "cuda" else "reference"
    plan, step = _plan(shape, keys), _step(shape, keys, x, size, weights)
    rules, reactivation = RULES, _module(weights)
    ours: dict[str, Job] = {
        "match": lambda: match.match(keys, 1, shape.removed, shape.prefix, rules, None, backend),
        "merge": lambda: merge.merge(x, size, plan, reactivation, backend),
        "match, merge, follow": lambda: step(backend),
    }
    plain: dict[str, Callable[[], Any]] = {
        "match": lambda: match.reference(keys, 1, shape.removed, shape.prefix, rules, None),
        "merge": lambda: merge.reference(x, size, plan, weights),
        "match, merge, follow": lambda: step("reference"),
    }
    wide = 8 * batch * (3 * shape.removed + shape.tokens - shape.removed)  # the plan, int64
    read = keys.numel() * keys.element_size()
    left = shape.tokens - shape.removed
    moved = (x.numel() + batch * left * x.shape[2]) * x.element_size() + 4 * batch * (shape.tokens + left)
    least = {
        "match": read + wide + 4 * batch * shape.removed,
        "merge": moved + wide,
        "match, merge, follow": read + moved + 8 * batch * (shape.tokens + left),
    }
    found = []
    for name, job in ours.items():
        jobs = {backend: _without_gradients(job), "eager": _without_gradients(plain[name])}
        if device.type == "cuda":
            jobs[GRAPHED] = graphed(jobs[backend])
        if compiled:
            jobs["compiled"] = _without_gradients(torch.compile(plain[name], fullgraph=True))
        found.append(Measure(name, jobs, least[name]))
    return [*found, _attention(shape, batch, keys, size, compiled)]


def step_job(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, backend: str) -> Job:
    """Return a job that matches, merges and follows the tokens of one layer."""
    step = _step(shape, *shape.drawn(batch, device, dtype))
    return _without_gradients(lambda: step(backend))


def _step(shape: Shape, keys: Tensor, x: Tensor, size: Tensor, weights: Weights) -> Callable[[str], Any]:
    reactivation = _module(weights)

    def step(backend: str) -> Any:
        arguments = (x, size, None, None, keys, 1, reactivation, shape.removed, shape.prefix, RULES)
        return merge_step(*arguments, backend=backend)

    return step


def _attention(shape: Shape, batch: int, keys: Tensor, size: Tensor, compiled: bool) -> Measure:
    """Attention with a size bias, in every way; the last is without any bias, the floor."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(batch, shape.tokens, 3, shape.heads, shape.head_dim, generator=generator)
    query, key, value = drawn.to(keys).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(way: str | None) -> Tensor:
        bias: Any = None if way is None else proportional(size, key.dtype, way)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    half = key.dtype in (torch.bfloat16, torch.float16)
    ways = ["mask", *(["fused"] if keys.is_cuda and half else []), "augmented"]
    ways += ["flex"] if compiled or keys.is_cuda else []
    jobs: dict[str, Job] = {way: _without_gradients(lambda way=way: attend(way)) for way in ways}  # type: ignore[misc]
    if "flex" in jobs and not keys.is_cuda:
        jobs["flex"] = _without_gradients(torch.compile(lambda: attend("flex"), fullgraph=True))
    jobs["no bias"] = _without_gradients(lambda: attend(None))
    return Measure("attention", jobs, 4 * query.numel() * query.element_size())


def _without_gradients(job: Callable[[], Any]) -> Job:
    def run() -> None:
        with torch.no_grad():
            job()

    return run


def _module(weights: Weights) -> nn.Module:
    """Return weights as a layer has them."""
    module = Reactivation(weights.pair.shape[0], weights.channel.shape[1], device=weights.pair.device)
    module = module.to(weights.pair.dtype)
    with torch.no_grad():
        module.pair_weight.copy_(weights.pair)
        module.channel_weight.copy_(weights.channel)
        module.norm.weight.copy_(weights.norm_weight)  # type: ignore[arg-type]
        module.norm.bias.copy_(weights.norm_bias)  # type: ignore[arg-type]
    return module


def rows_of(
    shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool, bandwidth: float
) -> list[Row]:
    """Time one shape.

    Args:
        shape: of the layer.
        batch: images.
        device: where.
        dtype: of tokens and keys.
        rounds: timed turns.
        compiled: whether plain PyTorch is timed compiled, too, and flex attention on a CPU.
        bandwidth: of a copy, in bytes a second.
    """
    torch.compiler.reset()
    rows = []
    for measure in measures(shape, batch, device, dtype, compiled):
        took = spreads(measure.jobs, rounds, 2, device)
        baselines = ("no bias", "mask") if measure.name == "attention" else ("eager", "compiled")
        for name, spread in took.items():
            if name in ("eager", "compiled"):
                continue
            ratios = {other: took[other].p50 / spread.p50 for other in baselines if other in took and other != name}
            share = measure.bytes_moved / spread.p50 / bandwidth
            goal, reached = _goal(measure.name, name, device, batch, ratios, share)
            rows.append(
                Row(
                    measured=measure.name,
                    implementation=name,
                    backbone=shape.backbone,
                    image_size=shape.image_size,
                    batch_size=batch,
                    dtype=str(dtype).removeprefix("torch."),
                    unit="us",
                    **_microseconds(spread),
                    ratios=ratios,
                    goal=goal,
                    reached=reached,
                    bytes_moved=measure.bytes_moved,
                    copy_share=share,
                    detail=f"{shape.tokens} tokens, r = {shape.removed}",
                )
            )
    return rows


def _goal(
    name: str, implementation: str, device: torch.device, batch: int, ratios: dict[str, float], share: float
) -> tuple[float | None, bool | None]:
    if device.type != "cuda" or batch < 256:
        return None, None
    if name == "match, merge, follow" and implementation != GRAPHED:
        return STEP_GOAL, ratios["eager"] >= STEP_GOAL
    return (COPY_GOAL, share >= COPY_GOAL) if name == "merge" and implementation == GRAPHED else (None, None)


def _microseconds(spread: Spread) -> dict[str, Any]:
    return {name: 1e6 * value for name, value in spread._asdict().items()}

"""Speed and memory of whole models against the unwrapped one: the floor is the MACs ratio, all in one run.

Weights are random (no time depends on them), images are real.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.backbones import macs, wrap
from pyra.cost import token_counts
from pyra.tasks.benchmarks.kernels import Shape, step_job
from pyra.tasks.benchmarks.processes import in_fresh_process, resident
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.benchmarks.subject import LEVELS, Subject
from pyra.tasks.data.task import image_dataset, load_task
from pyra.tasks.timing import Spread, forward, graphed, spreads

INFERENCE_GOAL = {"cpu": 0.95, "cuda": 0.90}  # of the MACs ratio
MACHINERY_GOAL = 0.05  # of the plain forward, on a GPU
COMPILE_GOAL = 1.5
STEP_GOAL = 2.2
MEMORY_GOAL = 0.5


def inference_rows(subject: Subject, batch_size: int, rounds: int, how: str = "") -> list[Row]:
    """Forward speed of both published schedules over the plain model, in turns.

    Args:
        subject: the model.
        batch_size: images.
        rounds: timed forwards of each.
        how: "compiled", "graphed" (from CUDA graphs) or, as models are, nothing; of all of them.
    """
    plain = subject.make().eval()
    models = {"plain": plain} | {level: wrap(copy.deepcopy(plain), subject.merging(level)) for level in LEVELS}
    floors = {level: macs(plain) / macs(models[level]) for level in LEVELS}
    if how == "compiled":
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}  # type: ignore[misc]
    images = photographs(subject, batch_size)
    jobs = {name: forward(model, images) for name, model in models.items()}
    if how == "graphed":
        jobs = {name: graphed(job) for name, job in jobs.items()}
    took = spreads(jobs, rounds, 1, subject.device)
    rows = []
    for level, floor in floors.items():
        speedup = took["plain"].p50 / took[level].p50
        goal = INFERENCE_GOAL[_kind(subject)] * floor
        rows.append(
            _row(
                subject,
                f"{how} forward, {level}".strip(),
                batch_size,
                "images/s",
                Spread(*(batch_size / seconds for seconds in reversed(took[level]))),
                {"plain": speedup},
                goal,
                speedup >= goal,
                f"plain {batch_size / took['plain'].p50:.1f} images/s; MACs ratio {floor:.2f}",
            )
        )
    return rows


def machinery_rows(subject: Subject, batch_size: int, rounds: int, how: str = "") -> list[Row]:
    """Time matching, merging and following of every layer at the high schedule, over one plain forward.

    The bias of the attention and the spreading after the last layer are in the forward's rows alone. ``how`` is as of
    :func:`inference_rows`; the plain forward is, too.
    """
    sizes, schedules = subject.shapes()
    device, dtype = torch.device(subject.device), getattr(torch, subject.dtype)
    plain, images, jobs = subject.make().eval(), photographs(subject, batch_size), {}
    for layer, (tokens, removed) in enumerate(
        zip(token_counts(sizes, schedules["high"]), schedules["high"], strict=False)
    ):
        if removed:
            heads = sizes.attention_dim // sizes.head_dim
            shape = Shape(subject.backbone, subject.side(), tokens, sizes.prefix_tokens, heads, sizes.head_dim, removed)
            jobs[str(layer)] = step_job(shape, batch_size, device, dtype, subject.backend)
    jobs |= {"plain": forward(plain, images)}
    if how == "graphed":
        jobs = {name: graphed(job) for name, job in jobs.items()}
    took = spreads(jobs, rounds, 2, device)
    whole = took.pop("plain").p50
    spread = Spread(*(1e6 * sum(column) for column in zip(*took.values(), strict=True)))
    share, on_a_gpu = spread.p50 / 1e6 / whole, device.type == "cuda"
    return [
        _row(
            subject,
            f"{how} merging machinery, high".strip(),
            batch_size,
            "us",
            spread,
            {"plain, share": share},
            MACHINERY_GOAL if on_a_gpu else None,
            share <= MACHINERY_GOAL if on_a_gpu else None,
            f"matching, merging and following in all layers; plain forward {1e6 * whole:.0f} us",
        )
    ]


def compile_rows(subject: Subject, batch_size: int) -> list[Row]:
    """Compile time of the merging model over the plain one's: cold caches, a fresh process each, shortest of two."""
    runs = [(level, in_fresh_process(_compile_seconds, subject, level, batch_size)) for level in ("plain", "high") * 2]
    seconds = {level: min(value for name, value in runs if name == level) for level in ("plain", "high")}
    ratio = seconds["high"] / seconds["plain"]
    return [
        _row(
            subject,
            "compile time, high",
            batch_size,
            "s",
            Spread(*3 * (seconds["high"],)),
            {"plain, share": ratio},
            COMPILE_GOAL,
            ratio <= COMPILE_GOAL,
            f"plain {seconds['plain']:.1f} s",
        )
    ]


def training_rows(subject: Subject, batch_size: int, rounds: int) -> list[Row]:
    """A training step and its peak memory: LoRA + PYRA at the high schedule against uncompressed LoRA."""
    took = spreads(
        {name: _training_step(subject, name, batch_size) for name in ("lora", "pyra")}, rounds, 1, subject.device
    )
    speedup = took["lora"].p50 / took["pyra"].p50
    lora, merged = (in_fresh_process(_peak_memory, subject, name, batch_size) for name in ("lora", "pyra"))
    sizes, schedules = subject.shapes()
    entering = token_counts(sizes, schedules["high"])[:-1]
    tokens = sum(entering) / len(entering) / sizes.tokens
    what = "whole process" if _kind(subject) == "cpu" else "allocated"
    whole, step = merged[0] / lora[0], merged[1] / lora[1]
    return [
        _row(
            subject,
            "training step, high",
            batch_size,
            "s",
            took["pyra"],
            {"plain": speedup},
            STEP_GOAL,
            speedup >= STEP_GOAL,
            f"uncompressed LoRA {took['lora'].p50:.2f} s",
        ),
        _row(
            subject,
            "peak memory of training, high",
            batch_size,
            "GB",
            Spread(*3 * (merged[0] / 1e9,)),
            {"plain, share": whole},
            MEMORY_GOAL,
            whole <= MEMORY_GOAL,
            f"uncompressed LoRA {lora[0] / 1e9:.2f} GB, {what}",
        ),
        _row(
            subject,
            "memory of a training step, high",
            batch_size,
            "GB",
            Spread(*3 * (merged[1] / 1e9,)),
            {"plain, share": step},
            tokens,
            step <= tokens,
            f"uncompressed LoRA {lora[1] / 1e9:.2f} GB, both above the loaded model; the goal is the share of tokens "
            "that enter the blocks",
        ),
    ]


def _row(
    subject: Subject,
    measured: str,
    batch_size: int,
    unit: str,
    spread: Spread,
    ratios: dict[str, float],
    goal: float | None,
    reached: bool | None,
    detail: str,
) -> Row:
    return Row(
        measured=measured,
        implementation="merged",
        backbone=subject.backbone,
        image_size=subject.side(),
        batch_size=batch_size,
        dtype=subject.dtype,
        unit=unit,
        **spread._asdict(),
        ratios=ratios,
        goal=goal,
        reached=reached,
        detail=detail,
    )


def _kind(subject: Subject) -> str:
    return torch.device(subject.device).type


def photographs(subject: Subject, count: int) -> Tensor:
    """Return images of the demo task as a subject takes them, [count, 3, S, S]."""
    side = subject.side()
    data = image_dataset(
        load_task("demo"), "test", image_size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), limit=count
    )
    images = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    return images[torch.arange(count) % len(images)].to(subject.device, getattr(torch, subject.dtype))


def _training_step(subject: Subject, name: str, batch_size: int) -> Callable[[], None]:
    config = subject.merging("high") if name == "pyra" else None
    plain = subject.make()
    images = photographs(subject, batch_size)
    model = adapt(plain, pyra=config, peft=peft_config("lora", 8)).train()
    labels = torch.arange(batch_size, device=images.device) % 100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak_memory(subject: Subject, name: str, batch_size: int) -> tuple[int, int]:
    """Peak bytes over two training steps, all and above the loaded model: of the process, or of the GPU."""
    step = _training_step(subject, name, batch_size)
    if _kind(subject) == "cuda":
        loaded = torch.cuda.memory_allocated(subject.device)
        torch.cuda.reset_peak_memory_stats(subject.device)
    else:
        loaded = resident("VmRSS:")
    step()
    step()
    peak = torch.cuda.max_memory_allocated(subject.device) if _kind(subject) == "cuda" else resident("VmHWM:")
    return peak, peak - loaded


def _compile_seconds(subject: Subject, level: str, batch_size: int) -> float:
    """What the first compiled forward takes longer than the second."""
    torch.compiler.config.force_disable_caches = True
    model = subject.make().eval()
    images = photographs(subject, batch_size)
    if level != "plain":
        wrap(model, subject.merging(level))
    compiled = torch.compile(model, fullgraph=True)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            compiled(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]

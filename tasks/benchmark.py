"""Speed and memory against the unwrapped timm model: the floor is the MACs ratio, the measure a ratio in one run.

Weights are random (no time depends on them), images are real.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.backbones import geometry, macs, schedule_for, wrap
from pyra.backbones.loading import create_backbone, preprocessing
from pyra.config import PyraConfig
from pyra.cost import token_counts
from pyra.tasks.data import image_dataset, load_task
from pyra.tasks.timing import take_turns, throughput

Result = TypeVar("Result")

LEVELS = ("low", "high")
INFERENCE_GOAL = 0.95  # of the MACs ratio
COMPILE_GOAL = 1.5
STEP_GOAL = 2.2
MEMORY_GOAL = 0.5


@dataclass(frozen=True)
class Subject:
    """The model that is measured: a timm name, and the image side in pixels (None: its own)."""

    backbone: str
    image_size: int | None = None

    def make(self) -> nn.Module:
        """Return the plain model with random weights, the same each time."""
        torch.manual_seed(0)
        return create_backbone(self.backbone, num_classes=100, pretrained=False, image_size=self.image_size)

    def merging(self, level: str) -> PyraConfig:
        """Return what merges at a published level, carried over to this model."""
        return PyraConfig(schedule=schedule_for(self.make(), preset=level))


@dataclass(frozen=True)
class BenchmarkRow:
    """One measured quantity.

    Attributes:
        name: what was measured.
        value: the ratio measured (speed-ups: higher is better; memory and compile time: lower).
        goal: what it is held against.
        reached: whether it holds.
        detail: the absolute figures behind the ratio.
    """

    name: str
    value: float
    goal: float
    reached: bool
    detail: str


def inference_rows(subject: Subject, batch_size: int, rounds: int, compiled: bool = False) -> list[BenchmarkRow]:
    """Forward speed of both published schedules over the plain model, fp32, in turns."""
    plain = subject.make().eval()
    models = {"plain": plain} | {level: wrap(copy.deepcopy(plain), subject.merging(level)) for level in LEVELS}
    ratios = {level: macs(plain) / macs(models[level]) for level in LEVELS}
    if compiled:
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}  # type: ignore[misc]
    speeds = throughput(models, _images(plain, batch_size), rounds=rounds)
    rows = []
    for level, ratio in ratios.items():
        speedup = speeds[level] / speeds["plain"]
        detail = f"{speeds[level]:.1f} against {speeds['plain']:.1f} images/s; MACs ratio {ratio:.2f}"
        name = f"{'compiled ' if compiled else ''}forward, {level}"
        goal = INFERENCE_GOAL * ratio
        rows.append(BenchmarkRow(name, speedup, goal, speedup >= goal, detail))
    return rows


def compile_rows(subject: Subject, batch_size: int) -> list[BenchmarkRow]:
    """Compile time of the merging model over the plain one's: cold caches, a fresh process each, shortest of two."""
    runs = [(level, _in_fresh_process(_compile_seconds, subject, level, batch_size)) for level in ("plain", "high") * 2]
    seconds = {level: min(value for name, value in runs if name == level) for level in ("plain", "high")}
    ratio = seconds["high"] / seconds["plain"]
    detail = f"{seconds['high']:.1f} against {seconds['plain']:.1f} s"
    return [BenchmarkRow("compile time, high", ratio, COMPILE_GOAL, ratio <= COMPILE_GOAL, detail)]


def training_rows(subject: Subject, batch_size: int, rounds: int) -> list[BenchmarkRow]:
    """A training step and its peak memory: LoRA + PYRA at the high schedule against uncompressed LoRA."""
    jobs = {name: _training_step(subject, name, batch_size) for name in ("lora", "pyra")}
    seconds = take_turns(jobs, rounds)
    speedup = seconds["lora"] / seconds["pyra"]
    del jobs
    peaks = {name: _in_fresh_process(_peak_memory, subject, name, batch_size) for name in ("lora", "pyra")}
    whole = peaks["pyra"][0] / peaks["lora"][0]
    step = peaks["pyra"][1] / peaks["lora"][1]
    tokens = _mean_tokens(subject)
    return [
        BenchmarkRow(
            "training step, high",
            speedup,
            STEP_GOAL,
            speedup >= STEP_GOAL,
            f"{seconds['pyra']:.2f} against {seconds['lora']:.2f} s",
        ),
        BenchmarkRow(
            "peak memory of training, high",
            whole,
            MEMORY_GOAL,
            whole <= MEMORY_GOAL,
            f"{peaks['pyra'][0] / 1e9:.2f} against {peaks['lora'][0] / 1e9:.2f} GB, whole process",
        ),
        BenchmarkRow(
            "memory of a training step, high",
            step,
            tokens,
            step <= tokens,
            f"{peaks['pyra'][1] / 1e9:.2f} against {peaks['lora'][1] / 1e9:.2f} GB above the loaded model; the goal is "
            "the share of tokens that enter the blocks",
        ),
    ]


def _mean_tokens(subject: Subject) -> float:
    """Mean number of tokens that enter a block at the high schedule, as a share of the plain model's."""
    model = subject.make()
    sizes = geometry(model)
    entering = token_counts(sizes, schedule_for(model, preset="high"))[:-1]
    return sum(entering) / len(entering) / sizes.tokens


def _images(model: nn.Module, count: int) -> Tensor:
    side = preprocessing(model).image_size
    data = image_dataset(
        load_task("demo"), "test", image_size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), limit=count
    )
    return torch.stack([data[i % len(data)]["pixel_values"] for i in range(count)])


def _training_step(subject: Subject, name: str, batch_size: int) -> Callable[[], None]:
    config = subject.merging("high") if name == "pyra" else None
    plain = subject.make()
    images = _images(plain, batch_size)
    model = adapt(plain, pyra=config, peft=peft_config("lora", 8)).train()
    labels = torch.arange(batch_size) % 100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_fresh_process(job: Callable[..., Result], *arguments: object) -> Result:
    """Run a job in a process of its own, with as many threads as this one has."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), job, *arguments).result()


def _with_threads(threads: int, job: Callable[..., Result], *arguments: object) -> Result:
    torch.set_num_threads(threads)
    return job(*arguments)


def _peak_memory(subject: Subject, name: str, batch_size: int) -> tuple[int, int]:
    """Peak resident bytes of the process over two training steps: all, and above the loaded model."""
    step = _training_step(subject, name, batch_size)
    loaded = _resident("VmRSS:")
    step()
    step()
    peak = _resident("VmHWM:")
    return peak, peak - loaded


def _compile_seconds(subject: Subject, level: str, batch_size: int) -> float:
    """What the first compiled forward takes longer than the second."""
    torch.compiler.config.force_disable_caches = True
    model = subject.make().eval()
    images = _images(model, batch_size)
    if level != "plain":
        wrap(model, subject.merging(level))
    compiled = torch.compile(model, fullgraph=True)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            compiled(images)
            seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def _resident(field: str) -> int:
    """Resident bytes of this process, now (``VmRSS:``) or at most (``VmHWM:``), as Linux tells them.

    Elsewhere the peak stands for both; on Linux ``ru_maxrss`` would include the parent's before ``exec``.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

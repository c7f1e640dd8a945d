"""Speed and memory against the unwrapped timm model: the floor is the MACs ratio, the measure a ratio in one run.

Weights are random (no time depends on them), images are real.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.backbones import macs, wrap
from pyra.backbones.loading import create_backbone, preprocessing
from pyra.config import PyraConfig
from pyra.tasks.data import image_dataset, load_task
from pyra.tasks.timing import take_turns, throughput

LEVELS = ("low", "high")
INFERENCE_GOAL = 0.95  # of the MACs ratio
STEP_GOAL = 2.2
MEMORY_GOAL = 0.5


@dataclass(frozen=True)
class BenchmarkRow:
    """One measured quantity.

    Attributes:
        name: what was measured.
        value: the ratio measured (speed-ups: higher is better; memory: lower).
        goal: what it is held against.
        reached: whether it holds.
        detail: the absolute figures behind the ratio.
    """

    name: str
    value: float
    goal: float
    reached: bool
    detail: str


def inference_rows(backbone: str, batch_size: int, rounds: int) -> list[BenchmarkRow]:
    """Forward speed of both published schedules over the plain model, fp32, in turns."""
    plain = _backbone(backbone).eval()
    models = {"plain": plain} | {
        level: wrap(copy.deepcopy(plain), PyraConfig.paper(backbone, level)) for level in LEVELS
    }
    speeds = throughput(models, _images(plain, batch_size), rounds=rounds)
    rows = []
    for level in LEVELS:
        ratio = macs(plain) / macs(models[level])
        speedup = speeds[level] / speeds["plain"]
        detail = f"{speeds[level]:.1f} against {speeds['plain']:.1f} images/s; MACs ratio {ratio:.2f}"
        rows.append(
            BenchmarkRow(
                f"forward, {level}", speedup, INFERENCE_GOAL * ratio, speedup >= INFERENCE_GOAL * ratio, detail
            )
        )
    return rows


def training_rows(backbone: str, batch_size: int, rounds: int) -> list[BenchmarkRow]:
    """A training step and its peak memory: LoRA + PYRA at the high schedule against uncompressed LoRA."""
    jobs = {name: _training_step(backbone, name, batch_size) for name in ("lora", "pyra")}
    seconds = take_turns(jobs, rounds)
    speedup = seconds["lora"] / seconds["pyra"]
    del jobs
    peaks = {name: _in_fresh_process(backbone, name, batch_size) for name in ("lora", "pyra")}
    share = peaks["pyra"] / peaks["lora"]
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
            share,
            MEMORY_GOAL,
            share <= MEMORY_GOAL,
            f"{peaks['pyra'] / 1e9:.2f} against {peaks['lora'] / 1e9:.2f} GB, whole process",
        ),
    ]


def _backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(name, num_classes=100, pretrained=False)


def _images(model: nn.Module, count: int) -> Tensor:
    side = preprocessing(model).image_size
    data = image_dataset(
        load_task("demo"), "test", image_size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), limit=count
    )
    return torch.stack([data[i % len(data)]["pixel_values"] for i in range(count)])


def _training_step(backbone: str, name: str, batch_size: int) -> Callable[[], None]:
    config = PyraConfig.paper(backbone, "high") if name == "pyra" else None
    plain = _backbone(backbone)
    images = _images(plain, batch_size)
    model = adapt(plain, pyra=config, peft=peft_config("lora", 8)).train()
    labels = torch.arange(batch_size) % 100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_fresh_process(backbone: str, name: str, batch_size: int) -> int:
    """Peak resident bytes of a process of its own that does two training steps."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_memory, backbone, name, batch_size, torch.get_num_threads()).result()


def _peak_memory(backbone: str, name: str, batch_size: int, threads: int) -> int:
    torch.set_num_threads(threads)
    step = _training_step(backbone, name, batch_size)
    step()
    step()
    return _peak_resident()


def _peak_resident() -> int:
    """Peak resident bytes of this process; on Linux ``ru_maxrss`` would include the parent's before ``exec``."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Two gloo processes train every family one step, under DDP and under FSDP2: `torchrun` runs this file.

For each family it writes the parameters after one SGD step, to compare with a single process on the whole batch.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from backbone_families import FAMILIES, build, config, result, run, trained
from module_and_its_threads import leave_at_once
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyra import wrap
from pyra.backbones.layers import MergingLayer

BATCH = 4


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """One SGD step on the mean square of the results, every sample counting the same."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result(run(model, inputs)).square().mean().backward()
    optimizer.step()


def wrapped(family: str) -> nn.Module:
    """Return the tiny model, merging, in training mode; scalars, which FSDP2 does not shard, are frozen."""
    model = trained(wrap(build(family), config())).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim > 0)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, gathered where they are sharded."""
    values = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in values.items()}


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: every layer that merges, and the rest."""
    for module in list(model.modules()):
        if isinstance(module, MergingLayer):
            fully_shard(module)
    return fully_shard(model, ignored_params={p for p in model.parameters() if p.ndim == 0})


def train_all(folder: Path) -> None:
    """Train every family in both ways and store what came out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # Several of transformers' models have parameters that their forward never uses (mask tokens, poolers).
    ways = {"ddp": partial(DistributedDataParallel, find_unused_parameters=True), "fsdp2": shard}
    for family, entry in FAMILIES.items():
        whole = entry.inputs(BATCH)
        share = {k: v[rank * BATCH // world :][: BATCH // world] if len(v) == BATCH else v for k, v in whole.items()}
        for way, parallel in ways.items():
            target = folder / f"{family}.{way}.pt"
            try:
                model = parallel(wrapped(family))
                step(model, share)
                outcome = parameters(model)
            except Exception as error:  # the test of this family shows it; the others go on
                outcome = {"error": f"{type(error).__name__}: {error}"}
            if rank == 0:
                torch.save(outcome, target)
            dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train_all(Path(sys.argv[1]))
    leave_at_once(0)

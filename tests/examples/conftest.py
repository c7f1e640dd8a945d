"""A small model that merges, for the examples to run."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pyra import PyraConfig, wrap

SIDE = 32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    made = wrap(timm.create_model("vit_tiny_patch16_224", **sizes).eval(), PyraConfig(schedule=[16, 8]))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

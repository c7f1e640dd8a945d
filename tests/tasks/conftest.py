"""A backbone small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a timm model folder with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    save_for_hf(model, str(folder), model_args=TINY, safe_serialization=True)
    return folder

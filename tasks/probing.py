"""A linear probe never changes its backbone: the features are computed once, and the head alone is trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.task import split_digest


class FeatureDataset(Dataset[dict[str, Any]]):
    """Items as of an image data set, with a feature [C] in the place of the pixels."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.features[index], "labels": int(self.labels[index])}


class FeatureStore:
    """Features of the splits of one experiment, each computed once, for all candidates and seeds of its probe."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, str], FeatureDataset] = {}

    def features(
        self, model: nn.Module, data: ImageDataset, *, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> FeatureDataset:
        """Return what :func:`frozen_features` does, computed where these images are new."""
        key = (split_digest(data.rows), data.image_size, str(dtype))
        if key not in self._found:
            self._found[key] = frozen_features(model, data, batch_size=batch_size, device=device, dtype=dtype)
        return self._found[key]


def probe_of(model: nn.Module) -> nn.Module | None:
    """Return the head that maps pooled features [B, C] to logits, or None for the two heads of a distilled model."""
    plain: Any = model
    head = plain.get_classifier()
    return head if isinstance(head, nn.Module) else None


def frozen_features(
    model: nn.Module,
    data: Dataset[dict[str, Any]],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> FeatureDataset:
    """Compute what the head of a timm model sees, in evaluation mode.

    Args:
        model: a timm model with one head.
        data: items with ``pixel_values`` [3, S, S] and ``labels``.
        batch_size: images a forward.
        device: where the model runs; the features come back to the CPU.
        dtype: autocast precision; float32 means none.
    """
    plain: Any = model.to(device).eval()
    features, labels = [], []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in tqdm(
            DataLoader(data, batch_size=batch_size), desc="features", unit="batch", leave=False, disable=None
        ):
            tokens = plain.forward_features(batch["pixel_values"].to(device))
            features.append(plain.forward_head(tokens, pre_logits=True).float().cpu())
            labels.append(batch["labels"])
    return FeatureDataset(torch.cat(features), torch.cat(labels))

"""Real weights and real pictures: what merging does to features that mean something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyra import PyraConfig, unwrap, wrap
from pyra.backbones.loading import create_backbone, preprocessing
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.task import image_dataset, load_task


def features(model: torch.nn.Module, data: ImageDataset) -> torch.Tensor:
    batches = torch.stack([item["pixel_values"] for item in data]).split(32)
    with torch.inference_mode():
        return torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in batches])


def centroid_accuracy(model: torch.nn.Module, train: ImageDataset, test: ImageDataset) -> float:
    """Accuracy of the nearest class mean among the classes seen in training."""
    x, y = torch.nn.functional.normalize(features(model, train), dim=-1), torch.tensor(train.labels)
    classes = y.unique()
    centroids = torch.stack([x[y == c].mean(0) for c in classes])
    labels = torch.tensor(test.labels)
    known = torch.isin(labels, classes)
    predicted = classes[(torch.nn.functional.normalize(features(model, test), dim=-1) @ centroids.T).argmax(1)]
    return float((predicted == labels)[known].float().mean())


@pytest.mark.slow  # about 600 forwards of a ViT-S
@pytest.mark.assets
def test_features_survive_merging(assets: Path) -> None:
    model = create_backbone(
        "vit_small_patch14_dinov2",
        num_classes=0,
        image_size=112,
        checkpoint=assets / "vit_small_patch14_dinov2_saliency.fp16.safetensors",
    ).eval()
    task, prepared = load_task(data=str(assets / "caltech101")), preprocessing(model)
    train, test = (
        image_dataset(task, split, image_size=prepared.image_size, mean=prepared.mean, std=prepared.std, limit=limit)
        for split, limit in (("train", 300), ("test", 100))
    )
    plain = centroid_accuracy(model, train, test)
    assert plain > 0.15  # three pictures a class, 101 classes: chance is 1 %
    wrap(model, PyraConfig(rate=0.3, reactivation=False))
    assert centroid_accuracy(model, train, test) > 0.7 * plain
    unwrap(model)
    assert centroid_accuracy(model, train, test) == plain

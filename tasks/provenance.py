"""Where a run's numbers come from: its data, its weights and its settings, as columns of a result."""

from __future__ import annotations

import enum
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from pyra.tasks.data.cards import load_card
from pyra.tasks.data.task import ImageDataset, Task, split_digest
from pyra.tasks.options import RunOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from pyra.config import PyraConfig

_OWN_FIELDS = frozenset({"backbone", "image_size", "task", "method", "seed", "epochs"})
_NO_SETTINGS = frozenset(
    (
        "checkpoint",
        "data",
        "root",
        "output",
        "overwrite",
        "resume",
        "device",
        "skip_broken",
        "track",
        "save_steps",
        "cache",
    )
)
_DIGEST = "backbone_sha256"


def provenance(
    options: RunOptions, task: Task, model: nn.Module, train_data: ImageDataset, test_data: ImageDataset
) -> dict[str, Any]:
    """Return the columns of a result that say what it was made from.

    Args:
        options: of the run.
        task: that was trained and scored on.
        model: made by :func:`pyra.tasks.runs.new_model`.
        train_data: the images it was trained on.
        test_data: the images it was scored on.
    """
    return {
        **scored(task, train_data.labels, test_data),
        "task_version": task.version,
        "train_sha256": split_digest(train_data.rows),
        "preprocessing": task.preprocessing,
        "data_source": data_source(options),
        "weights_sha256": getattr(model, _DIGEST, None),
        "adapter": adapter_settings(options),
        "settings": settings(options),
    }


def scored(task: Task, train_labels: Sequence[int], data: ImageDataset) -> dict[str, Any]:
    """Return the columns that belong to the images that were scored."""
    return {
        "higher_is_better": task.higher_is_better,
        "test_sha256": split_digest(data.rows),
        "majority_value": majority(train_labels, data.labels) if task.metric == "accuracy" else None,
    }


def majority(train: Iterable[int], test: Sequence[int]) -> float | None:
    """Return the accuracy of always answering the most frequent training class; of several, the first.

    >>> majority([0, 1, 1], [1, 0, 0, 0])
    0.25
    """
    counts = Counter(train)
    if not counts or not test:
        return None
    most = min(counts, key=lambda label: (-counts[label], label))
    return sum(label == most for label in test) / len(test)


def data_source(options: RunOptions) -> str:
    """Say where the images came from: ``shipped``, ``drawn``, the name of a folder or file, or what else was given."""
    given = options.data
    if given is None:
        card, _ = load_card(str(options.task))
        if card.brings_its_data:
            return {"parquet": "shipped", "sprites": "drawn"}.get(card.kind, card.kind)
        root = options.root or os.environ.get("PYRA_DATA") or ""
        return f"{Path(root).expanduser().resolve().name}/{card.folder}"
    path = Path(given).expanduser()
    return path.resolve().name if path.exists() else given


def settings(options: DataclassInstance) -> dict[str, Any]:
    """Return the options that decide a training and have no column of their own; no seed, no place, no device."""
    return {name: value for name, value in asdict(options).items() if name not in _OWN_FIELDS | _NO_SETTINGS}


class Adapting(Protocol):
    """Options that say what is attached to a backbone."""

    def peft_config(self) -> Any:
        """Return the PEFT method, or None."""

    def pyra_config(self) -> PyraConfig | None:
        """Return what to merge, or None."""


def adapter_settings(options: Adapting) -> dict[str, Any] | None:
    """Return what is attached to the backbone as plain JSON values; None where all weights are trained.

    ``peft`` holds the kind and what differs from its defaults, ``pyra`` the whole configuration of the merging.
    """
    peft, pyra = options.peft_config(), options.pyra_config()
    if peft is None and pyra is None:
        return None
    return {"peft": None if peft is None else _summary(peft), "pyra": None if pyra is None else pyra.to_dict()}


def _summary(config: Any) -> dict[str, Any]:
    plain = {"peft_type": _json(config.peft_type)}
    for one in fields(config):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = getattr(config, one.name)
        if value != default and one.name != "peft_version":
            plain[one.name] = _json(value)
    return plain


def _json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_json(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def remember_weights(model: nn.Module, pretrained: bool) -> nn.Module:
    """Note on a fresh backbone which weights it has, before an adapter changes them; returns it."""
    setattr(model, _DIGEST, weights_digest(model, leave_out=_head(model)) if pretrained else "random")
    return model


def weights_digest(model: nn.Module, leave_out: Iterable[nn.Module] = ()) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in order of name.

    Args:
        model: on any device.
        leave_out: modules inside it that do not count, such as a head that is new.
    """
    ignored = {id(tensor) for module in leave_out for tensor in [*module.parameters(), *module.buffers()]}
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        if id(tensor) in ignored:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def _head(model: nn.Module) -> list[nn.Module]:
    """Return the heads of a timm model: new ones, drawn for the classes of the task."""
    get = getattr(model, "get_classifier", None)
    heads = get() if callable(get) else ()
    return [head for head in (heads if isinstance(heads, tuple) else (heads,)) if isinstance(head, nn.Module)]

"""From options to a model, and from a run folder back to it.

run/
result.json     the result (pyra.tasks.results)
options.json    the options it was made with
labels.json     the class names
adapter/        what was trained (pyra.adapters.saving)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyra.adapters import adapt, fold_adapter, load_adapter
from pyra.backbones.loading import create_backbone
from pyra.errors import ConfigError, DataError, did_you_mean
from pyra.files import write_json
from pyra.tasks.options import RunOptions

DEMO_BACKBONE = Path(__file__).parent / "demo" / "backbone"
ADAPTER = "adapter"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONS, _LABELS = "options.json", "labels.json"


def resolve_device(name: str) -> torch.device:
    """Turn auto / cpu / cuda into a device; raises :class:`ConfigError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name} was asked for, but no CUDA device is available; use --device cpu")
    return torch.device(name)


def new_backbone(options: RunOptions, num_classes: int) -> nn.Module:
    """Create the pretrained backbone of a run with a new head."""
    name = str(DEMO_BACKBONE) if options.backbone == "demo" else options.backbone
    return create_backbone(
        name,
        num_classes=num_classes,
        image_size=options.image_size,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        drop_path_rate=0.0 if options.method == "linear" else options.drop_path,
    )


def new_model(options: RunOptions, num_classes: int) -> nn.Module:
    """Create the backbone and adapt it as the options say."""
    model = new_backbone(options, num_classes)
    if options.method == "full":
        return model
    return adapt(model, pyra=options.pyra_config(), peft=options.peft_config())


def save_run(folder: Path, options: RunOptions, labels: Sequence[str]) -> None:
    """Write what is needed to make the model again (the adapter itself is saved beside it)."""
    write_json(folder / _OPTIONS, asdict(options))
    write_json(folder / _LABELS, list(labels))


def load_run(folder: str | Path) -> tuple[nn.Module, RunOptions, list[str]]:
    """Read a run folder.

    Returns:
        The trained model with its PEFT layers folded, in evaluation mode on the CPU; its options; its class names.

    Raises:
        DataError: where the folder holds no finished run.
        CheckpointError: where the adapter does not fit the backbone (any longer).
    """
    folder = Path(folder)
    options = _read_options(folder)
    labels = _read_json(folder, _LABELS)
    model = load_adapter(new_backbone(options, len(labels)), folder / ADAPTER)
    return fold_adapter(model).eval().requires_grad_(False), options, labels


def _read_options(folder: Path) -> RunOptions:
    values = _read_json(folder, _OPTIONS)
    known = {f.name for f in fields(RunOptions)}
    unknown = [f"{key!r}{did_you_mean(key, known)}" for key in values if key not in known]
    if unknown:
        raise DataError(f"{folder / _OPTIONS}: unknown options {', '.join(unknown)}")
    return RunOptions(**values)


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no finished run ({name} is missing); make one with `pyra train`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from None

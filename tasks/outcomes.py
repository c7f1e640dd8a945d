"""Which test images a freshly trained model classifies right: what studies compare.

Kept as ``outcomes.json`` in the run's folder, so that a study that is cut off goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from pyra.adapters import fold_adapter
from pyra.backbones import set_rate
from pyra.errors import DataError
from pyra.files import read_json, write_json
from pyra.tasks.comparison import Right
from pyra.tasks.data.task import ImageDataset
from pyra.tasks.fitting.fit import fit, forget_checkpoints
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import DTYPES, new_model, resolve_device, task_for
from pyra.tasks.training import splits

FILE = "outcomes.json"


def outcomes(
    options: RunOptions,
    rates: Sequence[float],
    build: Callable[[RunOptions, int], nn.Module] = new_model,
    view: Callable[[ImageDataset], ImageDataset] | None = None,
) -> dict[float, Right]:
    """Train as the options say, fold, and return which test images are classified right at each rate.

    What an earlier call left in ``options.output`` is returned without training.

    Args:
        options: of the run.
        rates: to score at; none scores once, as trained, under the key 0.0.
        build: makes the adapted model for a number of classes.
        view: changes the test images before they are scored.

    Raises:
        DataError: where the folder holds the outcomes of other options or rates.
    """
    folder = Path(options.output)
    as_stored = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()}
    settings = {**as_stored, "rates": list(rates)}
    if (folder / FILE).is_file():
        stored = read_json(folder / FILE)
        if stored["settings"] != settings:
            raise DataError(f"{folder / FILE} is of a run with other options: remove it, or give another folder")
        return {float(rate): _unpacked(text) for rate, text in stored["right"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    device = resolve_device(options.device)
    task = task_for(options)
    model = build(options, len(task.labels))
    train_data, test_data = splits(options, task, model)
    test_data = test_data if view is None else view(test_data)
    fit(model, train_data, options, folder, device)
    folded = fold_adapter(model.eval()).to(device)
    found = {}
    for rate in rates or [0.0]:
        if rates:
            set_rate(folded, rate)
        found[rate] = right(folded, test_data, options)
    packed = {str(rate): "".join("01"[int(one)] for one in values) for rate, values in found.items()}
    write_json(folder / FILE, {"settings": settings, "right": packed})
    forget_checkpoints(folder)
    return found


def right(model: nn.Module, data: ImageDataset, options: RunOptions) -> Right:
    """Return which images of a split are classified right, in the precision of the run."""
    device, dtype = resolve_device(options.device), DTYPES[options.dtype]
    found = []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in DataLoader(data, batch_size=4 * options.batch_size):
            found.append(model(batch["pixel_values"].to(device)).argmax(-1).cpu() == batch["labels"])
    values: Right = torch.cat(found).numpy().astype(np.float32)
    return values


def _unpacked(text: str) -> Right:
    return np.array([float(one) for one in text], dtype=np.float32)

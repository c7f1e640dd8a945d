"""What to type to go on with a run: evaluate it, export it, use it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pyra.tasks.results import RunResult

PLACE = "RUN_FOLDER"
_USE = f"""import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from pyra.backbones.loading import preprocessing
from pyra.tasks.runs import load_run

model, options, labels = load_run({PLACE})
how = preprocessing(model)
prepare = v2.Compose([
    v2.Resize((how.image_size, how.image_size), InterpolationMode.BICUBIC),
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(how.mean, how.std),
])
print(labels[model(prepare(Image.open("photo.jpg").convert("RGB"))[None]).argmax()])
"""


@dataclass(frozen=True)
class Command:
    """A text for the shell (``sh``) or for Python (``python``), and what it does."""

    does: str
    language: str
    text: str


def commands(row: RunResult, run: Path | None = None) -> list[Command]:
    """Return the commands for a run; without a folder its place says :data:`PLACE`.

    Runs on texts are evaluated only: they are not exported, and answer no pictures.
    """
    shell = PLACE if run is None else shlex.quote(str(run))
    found = [Command("Evaluate", "sh", f"pyra evaluate {shell}")]
    if row.unit == "images":
        use = _USE if run is None else _USE.replace(PLACE, repr(str(run)))
        found += [
            Command("Export", "sh", f"pyra export {shell} --format onnx"),
            Command("Use in Python", "python", use),
        ]
    return found

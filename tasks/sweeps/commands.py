"""What to type to go on with a run: evaluate it, export it, use it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pyra.tasks.results import rate_text

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


def commands(unit: str, run: Path | None = None, rate: float | None = None) -> list[Command]:
    """Return the commands for a run.

    Runs on texts are evaluated only: they are not exported, and answer no pictures.

    Args:
        unit: what the run counts in a second, ``images`` or something of texts.
        run: its folder; without one its place says :data:`PLACE`.
        rate: to set on its model; None leaves the run's own.
    """
    shell = PLACE if run is None else shlex.quote(f"./{run}" if str(run).startswith("-") else str(run))
    asked = "" if rate is None else f" --rate {rate_text(rate)}"
    found = [Command("Evaluate", "sh", f"pyra evaluate {shell}{asked}")]
    if unit == "images":
        use = (
            _USE
            if rate is None
            else _USE.replace("load_run", "run_at_rate").replace(PLACE, f"{PLACE}, {rate_text(rate)}")
        )
        use = use if run is None else use.replace(PLACE, repr(str(run)))
        found += [
            Command("Export", "sh", f"pyra export {shell}{asked} --format onnx"),
            Command("Use in Python", "python", use),
        ]
    return found

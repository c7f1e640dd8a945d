"""Pictures of merged tokens in a report: those that lie in its folder, and those that are made on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pyra.errors import PyraError
from pyra.files import atomic_path
from pyra.tasks.sweeps.points import Point

PICTURES = "pictures"
_SHOWN, _MADE, _IMAGES = 6, 3, 2


def existing_pictures(folder: Path) -> list[Path]:
    """Return the first few of ``pictures/*.png``."""
    return sorted(file for file in (folder / PICTURES).glob("*.png") if file.is_file())[:_SHOWN]


def make_pictures(points: Sequence[Point], folder: Path) -> list[Path]:
    """Draw what merges in two test images at the lowest, a middle and the highest rate, where no picture lies yet.

    A run whose model or data are gone is left out.
    """
    merging = {round(one.row.rate, 2): one for one in reversed(points) if one.compressed and one.row.unit == "images"}
    rates = sorted(merging)
    chosen = sorted({rates[round(k * (len(rates) - 1) / (_MADE - 1))] for k in range(_MADE)}) if rates else []
    for rate in chosen:
        one = merging[rate]
        file = folder / PICTURES / f"{one.row.method}-{rate:.2f}.png"
        if not file.exists():
            try:
                _draw(one, file)
            except (PyraError, OSError):
                continue
    return existing_pictures(folder)


def _draw(one: Point, file: Path) -> None:
    from pyra.tasks.runs import run_at_rate, task_of_run
    from pyra.tasks.training import decode
    from pyra.tasks.visualize import draw

    model, options, labels = run_at_rate(one.run, one.asked_rate)
    data = decode(replace(options, limit=_IMAGES), task_of_run(one.run, options, labels), model, "test")
    drawn = draw(model.cpu(), [data.image(place) for place in range(len(data.labels))])
    with atomic_path(file) as temporary:
        drawn.picture.save(temporary)

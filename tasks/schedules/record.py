"""Schedules as JSON files: what ``pyra schedule`` writes and ``--schedule FILE.json`` reads. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.files import read_json, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ScheduleRecord:
    """A schedule and what it rests on.

    Attributes:
        schedule: tokens removed in each block.
        how: ``"rate"``, ``"latency"``, ``"calibrated"`` or ``"searched"``.
        backbone: name of the model.
        image_size: side of its images in pixels.
        target: what was asked for: ``rate``, ``seconds`` or ``speedup``.
        rate: share of the MACs that it saves.
        macs, plain_macs: MACs of an image with it, and without merging.
        predicted, measured: of a latency: ``seconds`` and ``speedup``, each also for ``first`` where it was corrected.
        layers: tokens, removed and cost of each layer, and its drift where it was calibrated.
        details: further numbers: costs of layers, calibration, trials.
        options: it was made with.
        environment: device, versions, commit and date.
    """

    schedule: list[int]
    how: str
    backbone: str
    image_size: int
    target: dict[str, float]
    rate: float
    macs: int
    plain_macs: int
    predicted: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    layers: list[dict[str, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the record, atomically."""
        write_json(path, {"format": FORMAT, **asdict(self)})


def read_schedule(path: str | Path) -> list[int]:
    """Read the schedule of a file that ``pyra schedule`` wrote.

    Raises:
        ConfigError: for a file that is none, in one line.
    """
    schedule: list[int] = _read(path)["schedule"]
    return schedule


def image_size_for(text: str, asked: int | None) -> int | None:
    """Return the side of the images that a schedule is for, where it is a file made for another than the model's own.

    Args:
        text: of the option ``--schedule``.
        asked: the side that was asked for, or None.

    Raises:
        ConfigError: where that is another: the schedule would save another share.
    """
    if not _is_file(text):
        return asked
    values = _read(text)
    options, side = values.get("options"), values.get("image_size")
    given = options.get("image_size") if isinstance(options, dict) else None
    if asked is not None and isinstance(side, int) and asked != side:
        raise ConfigError(
            f"{text} was made for images of {side} pixels, --image-size asks for {asked}: leave that out, or make a "
            "schedule for it"
        )
    return asked if asked is not None or not isinstance(given, int) else given


def _is_file(text: str) -> bool:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if all(part.lstrip("+-").isdigit() for part in parts):
        return False
    return text.lower().endswith(".json") or Path(text).is_file()


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = read_json(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    schedule = values.get("schedule") if isinstance(values, dict) else None
    if not isinstance(schedule, list) or not schedule or not all(type(entry) is int for entry in schedule):
        raise ConfigError(f"{path} holds no schedule: give a file that `pyra schedule` wrote")
    if isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise ConfigError(f"{path} has format {values['format']}, newer than this library's ({FORMAT}): upgrade it")
    found: dict[str, Any] = values
    return found


def parse_schedule(text: str) -> list[int]:
    """Return the schedule that an option gives: ``16,16,8``, or the name of a file.

    Raises:
        ConfigError: where it is neither.

    >>> parse_schedule("16,8")
    [16, 8]
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [int(part) for part in parts]
    except ValueError:
        if _is_file(text):
            return read_schedule(text)
        wrong = next(part for part in parts if not part.lstrip("+-").isdigit())
        raise ConfigError(
            f"--schedule: {wrong!r} is not a whole number; give one a block (16,16,8), or a JSON file of pyra schedule"
        ) from None

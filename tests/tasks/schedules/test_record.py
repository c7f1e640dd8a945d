"""Files of schedules keep the image size that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError
from pyra.files import write_json
from pyra.tasks.schedules.record import ScheduleRecord, image_size_for, parse_schedule


def stored(folder: Path, given: int | None, side: int = 64) -> str:
    record = ScheduleRecord(schedule=[4, 3], how="rate", backbone="demo", image_size=side, target={"rate": 0.3},
                            rate=0.3, macs=7, plain_macs=10, options={"image_size": given})  # fmt: skip
    record.save(folder / "schedule.json")
    return str(folder / "schedule.json")


def test_a_schedule_made_at_another_size_trains_at_it(tmp_path: Path) -> None:
    assert image_size_for(stored(tmp_path, 64), None) == 64
    assert image_size_for(stored(tmp_path, 64), 64) == 64
    assert image_size_for(stored(tmp_path, None), None) is None  # the model's own, as in the run


def test_another_size_would_be_another_schedule(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made for images of 64 pixels, --image-size asks for 96: leave that out"):
        image_size_for(stored(tmp_path, 64), 96)


def test_numbers_have_no_size() -> None:
    assert image_size_for("16,8", None) is None and image_size_for("16,8", 96) == 96
    assert parse_schedule(" 16, 8") == [16, 8]


@pytest.mark.parametrize("content", [[], {}, {"schedule": []}, {"schedule": ["a"]}, {"schedule": [1.5]}, 3])
def test_what_is_no_schedule_is_told_in_a_line(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", content)
    for read in (parse_schedule, lambda text: image_size_for(text, None)):
        with pytest.raises(ConfigError, match="holds no schedule"):
            read(str(tmp_path / "a.json"))

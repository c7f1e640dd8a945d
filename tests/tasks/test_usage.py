"""Seconds, peak memory and energy of a piece of work."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from pyra.tasks.usage import CpuEnergy, GpuEnergy, Meter


def zone(folder: Path, path: str, name: str, energy: int, whole: int = 1_000_000) -> Path:
    home = folder / path
    home.mkdir(parents=True)
    (home / "name").write_text(f"{name}\n")
    (home / "max_energy_range_uj").write_text(f"{whole}\n")
    (home / "energy_uj").write_text(f"{energy}\n")
    return home / "energy_uj"


def test_packages_and_memory_are_added_and_cores_and_platform_are_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 100)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 100)
    with Meter(powercap=tmp_path) as meter:
        for file, now in ((package, 500_100), (other, 250_100), (memory, 1_100), (cores, 400_000), (platform, 900_000)):
            file.write_text(str(now))
    assert meter.usage.energy_joules == pytest.approx(0.751)
    assert meter.usage.energy_of == "package-0, dram, package-1"


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    with Meter(powercap=tmp_path) as meter:
        file.write_text("100000")
    assert meter.usage.energy_joules == pytest.approx(0.2)


def test_a_counter_that_wraps_around_many_times_is_read_in_between(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter = CpuEnergy.of(tmp_path)
    assert counter is not None
    for now in (600_000, 200_000, 800_000, 400_000):  # 0.6, wrapped 0.6, 0.6, wrapped 0.6
        file.write_text(str(now))
        counter.read()
    assert counter.joules() == pytest.approx(2.4)

    threads = threading.active_count()
    with Meter(powercap=tmp_path, between=0.02) as meter:
        for now in (900_000, 300_000, 700_000):
            temporary = file.with_name("new")
            temporary.write_text(str(now))
            temporary.replace(file)
            time.sleep(0.2)
        assert threading.active_count() == threads + 1
    assert meter.usage.energy_joules == pytest.approx(0.5 + 0.4 + 0.4)
    assert threading.active_count() == threads


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("how", ["missing", "text"])
def test_one_package_that_cannot_be_read_makes_it_unknown(tmp_path: Path, broken: str, how: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    file = zone(tmp_path, "intel-rapl:1", "package-1", 0).with_name(broken)
    file.unlink()
    if how == "text":
        file.write_text("none")
    with Meter(powercap=tmp_path) as meter:
        pass
    assert (meter.usage.energy_joules, meter.usage.energy_of) == (None, None)


def test_a_counter_that_vanishes_meanwhile_makes_it_unknown(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with Meter(powercap=tmp_path) as meter:
        file.unlink()
    assert (meter.usage.energy_joules, meter.usage.energy_of) == (None, None)


def test_a_gpu_counter_that_cannot_be_read_any_more() -> None:
    readings = [5_000, 12_500]
    counter = GpuEnergy(lambda: readings.pop(0), "a GPU")
    assert counter.joules() == 7.5
    assert counter.joules() is None


def test_seconds_and_memory(tmp_path: Path) -> None:
    with Meter(powercap=tmp_path / "none") as first:
        block = bytearray(200_000_000)
        del block
        time.sleep(0.05)
    assert 0.05 <= first.usage.wall_seconds < 5
    assert first.usage.energy_joules is None
    assert first.usage.peak_memory_bytes is not None and first.usage.peak_memory_bytes > 200_000_000
    if sys.platform == "linux":  # there the peak of earlier work is forgotten
        with Meter(powercap=tmp_path / "none") as second:
            pass
        assert second.usage.peak_memory_bytes is not None
        assert second.usage.peak_memory_bytes < first.usage.peak_memory_bytes - 100_000_000

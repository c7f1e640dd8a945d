"""What a piece of work uses: seconds, peak memory and energy."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_BETWEEN_READINGS = 60.0  # seconds; a counter of 262 kJ wraps every 20 minutes at 200 W


@dataclass(frozen=True)
class Usage:
    """What was used; None is what could not be read. ``energy_of`` names the parts whose energy is counted."""

    wall_seconds: float
    peak_memory_bytes: int | None
    energy_joules: float | None
    energy_of: str | None

    def columns(self) -> dict[str, Any]:
        """Return the values as columns of a :class:`~pyra.tasks.results.RunResult`."""
        return asdict(self)


class Meter:
    """Measures what happens between :meth:`start` and :meth:`stop`, or within a ``with`` block (then in ``usage``).

    On a GPU, memory is what torch allocated there and energy is the GPU's; on a CPU, memory is the process's and energy
    that of its packages and memory, whoever uses them. Energy is of the whole device, idle power included. The counters
    of memory are reset at the start, so meters do not nest.

    Args:
        device: where the work runs.
        powercap: folder of the CPU's energy counters (Linux, mostly readable by root only).
        between: seconds between two readings of counters that wrap around.

    >>> with Meter() as meter:
    ...     total = sum(range(1000))
    >>> meter.usage.wall_seconds > 0
    True
    """

    usage: Usage

    def __init__(
        self, device: torch.device | str = "cpu", powercap: Path = POWERCAP, between: float = _BETWEEN_READINGS
    ) -> None:
        self._device = torch.device(device)
        self._powercap = powercap
        self._between = between

    def __enter__(self) -> Meter:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Meter:
        """Begin; returns the meter."""
        self._peak = _memory_on_gpu(self._device) if self._device.type == "cuda" else _memory_of_process()
        counter = GpuEnergy.of(self._device) if self._device.type == "cuda" else CpuEnergy.of(self._powercap)
        self._energy = counter
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if isinstance(counter, CpuEnergy):
            self._thread = threading.Thread(
                target=_keep_reading, args=(counter, self._done, self._between), daemon=True
            )
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def stop(self) -> Usage:
        """End; returns what was used since the start."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        joules = None if self._energy is None else self._energy.joules()
        self.usage = Usage(
            wall_seconds=seconds,
            peak_memory_bytes=self._peak(),
            energy_joules=joules,
            energy_of=None if joules is None or self._energy is None else self._energy.of_what,
        )
        return self.usage


class CpuEnergy:
    """Energy since it was made, from counters that start again at 0 above their range (RAPL, in microjoules).

    Args:
        zones: file of each counter with its range.
        of_what: the parts they count.
    """

    def __init__(self, zones: Mapping[Path, int], of_what: str) -> None:
        self._zones = dict(zones)
        self.of_what = of_what
        self._lock = threading.Lock()
        self._last = {file: _number(file) for file in self._zones}
        self._sum: int | None = 0

    @classmethod
    def of(cls, powercap: Path) -> CpuEnergy | None:
        """Return the counters of all packages and their memory, or None where one of them cannot be read.

        Cores are part of their package, and a platform (``psys``) holds packages: neither is added to them.
        """
        zones, names = {}, []
        for folder in sorted(powercap.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text(encoding="utf-8").strip()
                if not name.startswith("package") and name != "dram":
                    continue
                _number(folder / "energy_uj")
                zones[folder / "energy_uj"] = _number(folder / "max_energy_range_uj")
            except (OSError, ValueError):
                return None
            names.append(name)
        try:
            return cls(zones, ", ".join(names)) if zones else None
        except (OSError, ValueError):
            return None

    def read(self) -> None:
        """Add what was used since the last reading; at most one turn of a counter may lie between two of them."""
        with self._lock:
            try:
                for file, whole in self._zones.items():
                    now = _number(file)
                    used = now - self._last[file]
                    self._last[file] = now
                    if self._sum is not None:
                        self._sum += used if used >= 0 else used + whole
            except (OSError, ValueError):
                self._sum = None

    def joules(self) -> float | None:
        """Return the energy so far, or None where a counter could not be read any more."""
        self.read()
        return None if self._sum is None else self._sum / 1e6


class GpuEnergy:
    """Energy of one GPU since it was made, from its own counter (NVML, in millijoules)."""

    def __init__(self, read: Callable[[], int], of_what: str) -> None:
        self._read = read
        self._first = read()
        self.of_what = of_what

    @classmethod
    def of(cls, device: torch.device) -> GpuEnergy | None:
        """Return the counter of a CUDA device, or None without ``pynvml`` or on a GPU that has none."""
        try:
            pynvml = importlib.import_module("pynvml")
            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(device)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            return cls(lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)), properties.name)
        except Exception:  # the library is optional, and raises what its driver reports
            return None

    def joules(self) -> float | None:
        """Return the energy so far, or None where it cannot be read any more."""
        try:
            return (self._read() - self._first) / 1e3
        except Exception:  # as above
            return None


def _keep_reading(counter: CpuEnergy, done: threading.Event, between: float) -> None:
    while not done.wait(between):
        counter.read()


def _memory_on_gpu(device: torch.device) -> Callable[[], int | None]:
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: int(torch.cuda.max_memory_allocated(device))


def _memory_of_process() -> Callable[[], int | None]:
    """Reset the highest memory use of the process where the system lets us; else it is that since the process began."""
    try:
        import resource
    except ImportError:  # not everywhere
        return lambda: None
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="ascii")
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))

"""Made-up finished runs: ``python tests/support/many_runs.py FOLDER 10000`` writes and reports so many."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from pyra.tasks.results import RunResult

METHODS = ("lora", "dora", "ia3", "vera", "bottleneck", "prompts", "tome", "pyra")


def write_runs(folder: Path, count: int, seeds: int = 3) -> None:
    """Write ``count`` runs of random methods, rates and learning rates, each with some seeds; no predictions."""
    draw = random.Random(0)
    for number in range(count):
        if number % seeds == 0:
            method, lr = draw.choice(METHODS), draw.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2]) * draw.uniform(0.9, 1.1)
            rate = round(draw.uniform(0.1, 0.8), 3) if method in METHODS[-2:] else 0.0
            level, size = 0.55 - 0.2 * rate**3 + draw.gauss(0, 0.02), draw.randrange(2000, 200000)
        row: dict[str, Any] = RunResult(
            task="demo", method=method, metric="accuracy", value=level + draw.gauss(0, 0.01), rate=rate,
            macs=int(583e6 * (1 - rate)), schedule=[int(20 * rate)] * 8, trained_parameters=size, seed=number % seeds,
            images_per_second=95 / (1 - rate) * draw.uniform(0.93, 1), speedup=1 / (1 - rate), backbone="demo",
            weights_sha256="6" * 64, image_size=96, batch_size=32, throughput_batch_size=32, epochs=1.0, num_test=372,
            train_seconds=4.9, wall_seconds=7.2, peak_memory_bytes=int(9e8 * (1.2 - rate)), test_sha256="f" * 64,
            train_sha256="d" * 64, protocol="fixed", preprocessing="squash", data_source="shipped",
            settings={f"option_{k}": None for k in range(30)} | {"lr": lr, "rate": rate, "peft": None},
            adapter={"peft": {"peft_type": "LORA", "target_modules": ["qkv"]}, "pyra": {"rate": rate, "window": 1}},
            environment={"device": "a CPU", "torch": "2.14", "date": "2026-01-01T00:00:00+00:00"} | {
                f"library_{k}": "1.0" for k in range(12)
            },
        ).to_dict()  # fmt: skip
        home = folder / "runs" / f"{number:05}"
        home.mkdir(parents=True)
        (home / "result.json").write_text(json.dumps(row, indent=2), encoding="utf-8")


if __name__ == "__main__":
    from pyra.tasks.sweeps.report import write_report

    target, wanted = Path(sys.argv[1]), int(sys.argv[2])
    write_runs(target, wanted)
    started = time.perf_counter(), time.process_time()
    page = write_report(target)
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"{wanted:,} runs: {wall:.1f} s ({processor:.1f} s of processor), {page.stat().st_size / 1e6:.1f} MB")

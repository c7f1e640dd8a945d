"""A run exported: compared on real test images, and timed in its own runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from pyra.backbones.loading import preprocessing
from pyra.export import ExportReport, export_model, load_exported
from pyra.files import write_json
from pyra.tasks.evaluation import data_for
from pyra.tasks.output import staged_output
from pyra.tasks.runs import run_at_rate, task_of_run
from pyra.tasks.timing import take_turns


def export_run(
    run: str | Path,
    folder: str | Path,
    *,
    format: str = "onnx",
    overwrite: bool = False,
    rate: float | None = None,
    images: int = 32,
    tolerance: float = 1e-3,
) -> tuple[ExportReport, dict[str, float]]:
    """Export a run folder and compare it on images of the test split.

    Returns:
        The comparison, and images/s of the model in PyTorch and of the exported file, measured in turns.

    Raises:
        DataError, CheckpointError: where the run cannot be read.
        OutputError: where ``folder`` holds an export and ``overwrite`` is false, or something else.
        ExportError: where the reloaded file differs; an earlier export stays.
    """
    model, options, labels = run_at_rate(run, rate)
    prepared = preprocessing(model)
    task = task_of_run(run, options, labels)
    data = data_for(model, task, "test", skip_broken=options.skip_broken, limit=images, cache=options.cache)
    batch = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    metadata = {
        "labels": "\n".join(labels),
        "image_size": str(prepared.image_size),
        "mean": " ".join(map(str, prepared.mean)),
        "std": " ".join(map(str, prepared.std)),
        "task": task.name,
        "backbone": options.backbone,
    }
    with staged_output(folder, "export", overwrite) as staging:
        report = export_model(model, staging, format, example_input=batch, tolerance=tolerance, metadata=metadata)
        exported = load_exported(staging)

        def eager() -> None:
            with torch.inference_mode():
                model(batch)

        seconds = take_turns({"PyTorch": eager, format: lambda: exported(batch)}, rounds=5)
        speeds = {name: len(batch) / value for name, value in seconds.items()}
        write_json(staging / "speed.json", {"batch_size": len(batch), "images_per_second": speeds})
    return report, speeds

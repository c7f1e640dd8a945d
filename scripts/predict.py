"""``pyra predict``: what a run or an export answers on images of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError, OutputError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class PredictOptions:
    """Options of ``pyra predict``."""

    inputs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folder of a run or of an export, then images or folders of images",
            "metavar": "FOLDER IMAGE",
            "repeated": True,
        },
    )
    top: int = option(5, "classes to list for each image")
    batch_size: int = option(16, "images a forward")
    runtime: str | None = option(None, "that opens an export: pytorch, onnxruntime or openvino; the first installed")
    threads: int | None = option(None, "of the runtime; its own choice by default")
    device: str = option("auto", "of a run: auto, cpu or cuda")
    trust_code: bool = option(False, "open an export that is machine code (aoti), which runs with your rights")
    skip_broken: bool = option(False, "list images that cannot be read under 'skipped' instead of stopping")
    output: str | None = option(None, "write the JSON to this file instead of the screen", metavar="FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, predict, print one JSON object."""
    options = parse(
        PredictOptions,
        argv,
        prog="pyra predict",
        description=(
            "Classify images with a run or an export, prepared as they were for training.\n"
            "The answer is one JSON object; everything else goes to stderr."
        ),
        example=(
            "pyra predict runs/a photo.jpg\n"
            "  pyra predict runs/a/export/onnx photos/ --runtime openvino --top 1 --output answers.json"
        ),
        positional="inputs",
    )
    if len(options.inputs) < 2:
        raise ConfigError("give a folder and at least one image: pyra predict FOLDER IMAGE (see 'pyra predict --help')")
    folder, *names = options.inputs
    if Path(folder).expanduser().is_file():
        raise ConfigError(f"{folder} is a file: the folder of a run or an export comes first, then the images")
    _check_output(options)
    text = json.dumps(_predict(options, folder, names), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        from pyra.files import write_text

        write_text(Path(options.output).expanduser(), text)
        print(f"written to {options.output}", file=sys.stderr)
    return 0


def _check_output(options: PredictOptions) -> None:
    """Refuse an output that cannot be one before anything is computed."""
    if options.output is None:
        return
    output = Path(options.output).expanduser()
    if output.is_dir():
        raise OutputError(f"{options.output} is a folder: --output names a file")
    if output.exists() and output.resolve() in [Path(name).expanduser().resolve() for name in options.inputs]:
        raise OutputError(f"{options.output} is one of the images: choose another --output")


def _predict(options: PredictOptions, folder: str, names: Sequence[str]) -> dict[str, Any]:
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()  # before anything loads what would talk
    from pyra.tasks.predicting import open_classifier
    from pyra.tasks.predicting_files import image_files, predict_files, readable

    good, broken = readable(image_files(names), skip_broken=options.skip_broken)
    classifier = open_classifier(
        folder,
        runtime=options.runtime,
        threads=options.threads,
        device=options.device,
        trust_code=options.trust_code,
    )
    predictions, skipped = predict_files(
        classifier, good, top=options.top, batch_size=options.batch_size, skip_broken=options.skip_broken
    )
    answer = {
        "model": folder,
        "format": classifier.format,
        "runtime": classifier.runtime,
        "predictions": [asdict(one) for one in predictions],
    }
    return {**answer, "skipped": [asdict(one) for one in (*broken, *skipped)]} if options.skip_broken else answer

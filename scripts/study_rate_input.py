"""Compare one ONNX file that takes the rate as an input with a file a rate: ``study_rate_input``.

The one file holds a graph a rate in the branches of an ``If``, over one set of weights. Both are timed in turns, in
each runtime, on the same images.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyra.records import option
from pyra.scripts.cli import parse

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, ModelProto

SWITCH = "second_rate"
Run = Callable[["np.ndarray", bool], "np.ndarray"]


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("vit_base_patch16_224", "timm name; its weights are random, which no time depends on")
    rates: tuple[float, ...] = option((0.3, 0.7), "two rates")
    batch_sizes: tuple[int, ...] = option((1, 16), "images a forward")
    rounds: int = option(9, "timed forwards of each; the median counts")
    threads: int | None = option(None, "CPU threads; all by default")
    output: str = option("results/rate-input-cpu.json", "file to write the rows to")


def main(argv: Sequence[str] | None = None) -> int:
    """Export, join, check, time, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_rate_input",
        description="Time one ONNX file with a rate input against a file a rate.",
        example="python -m pyra.scripts.study_rate_input --backbone vit_base_patch16_224 --rates 0.3,0.7",
    )
    import tempfile

    import torch
    from tabulate import tabulate

    from pyra.errors import ConfigError
    from pyra.files import write_json
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment

    quiet_libraries()
    if len(options.rates) != 2:
        raise ConfigError("--rates takes two rates, as in --rates 0.3,0.7")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        rows = _measured(options, Path(folder))
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    write_json(options.output, {"options": settings, "rows": rows, "environment": environment("cpu")})
    print(f"written to {options.output}")
    return 0


def _measured(options: StudyOptions, folder: Path) -> list[dict[str, Any]]:
    import onnx
    import torch

    from pyra.tasks.benchmarks.exports import demo_images
    from pyra.tasks.benchmarks.subject import Subject
    from pyra.tasks.timing import spreads

    images = demo_images(Subject(options.backbone).side(), max(options.batch_sizes)).numpy()
    files = [_exported(options.backbone, rate, folder / str(rate), images) for rate in options.rates]
    one = folder / "one.onnx"
    onnx.save(joined([onnx.load(str(file)) for file in files]), str(one))
    sizes = [sum(file.stat().st_size for file in files) / 1e6, one.stat().st_size / 1e6]
    rows = []
    for runtime, opener in (("onnxruntime", _in_onnxruntime), ("openvino", _in_openvino)):
        apart = [opener(file, torch.get_num_threads(), joined=False) for file in files]
        together = opener(one, torch.get_num_threads(), joined=True)
        for number in options.batch_sizes:
            batch = images[:number]
            jobs: dict[str, Callable[[], object]] = {}
            for index, rate in enumerate(options.rates):
                second = bool(index)
                difference = float(abs(together(batch, second) - apart[index](batch, second)).max())
                if difference > 1e-3:
                    raise RuntimeError(f"the joined file answers otherwise in {runtime}: by {difference:.2g}")
                jobs[f"apart {rate}"] = partial(apart[index], batch, second)
                jobs[f"one {rate}"] = partial(together, batch, second)
            took = spreads(jobs, options.rounds, 2)
            rows += [
                {
                    "runtime": runtime,
                    "batch_size": number,
                    "rate": rate,
                    "apart_ms": 1e3 * took[f"apart {rate}"].p50,
                    "one_ms": 1e3 * took[f"one {rate}"].p50,
                    "one_over_apart": took[f"one {rate}"].p50 / took[f"apart {rate}"].p50,
                    "apart_mb": sizes[0],
                    "one_mb": sizes[1],
                }
                for rate in options.rates
            ]
    return rows


def _exported(backbone: str, rate: float, folder: Path, images: np.ndarray) -> Path:
    import torch

    from pyra import PyraConfig, wrap
    from pyra.export import export_model
    from pyra.tasks.benchmarks.subject import Subject

    model = Subject(backbone).make().eval()
    wrap(model, PyraConfig(rate=rate))
    export_model(model, folder, "onnx", example_input=torch.from_numpy(images[:4]))
    return folder / "model.onnx"


def joined(models: Sequence[ModelProto]) -> ModelProto:
    """Return one model of two: ``pixel_values`` and ``second_rate`` (a bool) in, ``logits`` out."""
    from onnx import TensorProto, ValueInfoProto, helper

    weights: dict[str, Any] = {}
    (output,) = (ValueInfoProto.FromString(value.SerializeToString()) for value in models[0].graph.output)
    branches = [_branch(model.graph, f"rate{index}", weights) for index, model in enumerate(models)]
    switch = helper.make_node("If", [SWITCH], [output.name], then_branch=branches[1], else_branch=branches[0])
    inputs = [*models[0].graph.input, helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, [])]
    whole = helper.make_graph([switch], "rates", inputs, [output], list(weights.values()))
    result: ModelProto = helper.make_model(
        whole, opset_imports=list(models[0].opset_import), ir_version=models[0].ir_version
    )
    return result


def _branch(graph: GraphProto, prefix: str, weights: dict[str, Any]) -> GraphProto:
    """Return a graph as a branch; its weights go to ``weights``, equal ones once."""
    from onnx import helper

    given = {value.name for value in graph.input}
    names = {"": ""} | {name: name for name in given}
    for tensor in graph.initializer:
        old, tensor.name = tensor.name, ""
        names[old] = "w" + hashlib.sha256(tensor.SerializeToString(deterministic=True)).hexdigest()
        tensor.name = names[old]
        weights.setdefault(tensor.name, tensor)
    for node in graph.node:
        node.name = f"{prefix}/{node.name}"
        for values in (node.input, node.output):
            values[:] = [names.setdefault(name, f"{prefix}/{name}") for name in values]
    for value in graph.output:
        value.name = names[value.name]
    return helper.make_graph(list(graph.node), prefix, [], list(graph.output))


def _in_onnxruntime(path: Path, threads: int, *, joined: bool) -> Run:
    from pyra.export.onnx import onnxruntime_session

    session = onnxruntime_session(path, threads)

    def run(batch: np.ndarray, second: bool) -> np.ndarray:
        logits: np.ndarray = session.run(None, _inputs(batch, second, joined))[0]
        return logits

    return run


def _in_openvino(path: Path, threads: int, *, joined: bool) -> Run:
    from pyra.export.onnx import openvino_model

    compiled = openvino_model(path, threads)

    def run(batch: np.ndarray, second: bool) -> np.ndarray:
        logits: np.ndarray = compiled(_inputs(batch, second, joined))[0].copy()
        return logits

    return run


def _inputs(batch: np.ndarray, second: bool, joined: bool) -> dict[str, Any]:
    import numpy as np

    return {"pixel_values": batch} | ({SWITCH: np.array(second)} if joined else {})


if __name__ == "__main__":
    sys.exit(main())

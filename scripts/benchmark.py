"""``pyra benchmark``: whole models against the unwrapped ones, kernels against plain PyTorch, adapters against PEFT."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pyra.errors import ConfigError, did_you_mean
from pyra.records import ABOVE_0, Bounds, bound_problems
from pyra.scripts.benchmark_options import (
    AdapterOptions,
    ExpertOptions,
    ExportsOptions,
    InputOptions,
    KernelOptions,
    ModelOptions,
    ServeOptions,
)
from pyra.scripts.cli import parse
from pyra.tasks.options import DEVICES

Options = TypeVar("Options")
_COUNT = Bounds("at least 1", lambda value: value >= 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is named (``model`` without a word), print a table and write the rows."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    what = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "model"
    stages = {
        "model": _model,
        "kernels": _kernels,
        "adapters": _adapters,
        "experts": _experts,
        "decoder": _decoder,
        "input": _input,
        "exports": _exports,
        "serve": _serve,
    }
    if what not in stages:
        raise ConfigError(f"pyra benchmark measures {', '.join(stages)}, not {what!r}{did_you_mean(what, stages)}")
    return stages[what](arguments)


def _model(arguments: Sequence[str]) -> int:
    options = _options(
        ModelOptions,
        arguments,
        "model",
        description=(
            "Measure speed and memory against the unwrapped model in one run. 'pyra benchmark kernels' measures the\n"
            "merging step alone, 'pyra benchmark adapters' loading, switching and elastic training, 'pyra benchmark\n"
            "experts' LoRA on routed experts, 'pyra benchmark decoder' language models that merge their prompts,\n"
            "'pyra benchmark input' images on their way to a training step, 'pyra benchmark exports' ONNX in its\n"
            "runtimes, 'pyra benchmark serve' a server under load; each has a --help."
        ),
        example=(
            "pyra benchmark model --backbone vit_base_patch16_224 --batch-size 16\n"
            "  pyra benchmark model --device cuda --dtype bfloat16 --batch-size 256 --no-training"
        ),
    )
    _start(options)
    from pyra.tasks.benchmarks.model import compile_rows, inference_rows, machinery_rows, training_rows
    from pyra.tasks.benchmarks.subject import Subject

    subject = Subject(
        options.backbone, options.image_size, options.device, options.dtype, options.backend, options.attention
    )
    subject.shapes()  # says what cannot be before anything is timed
    stages: list[tuple[str, Callable[[], list[Any]]]] = [
        ("forward", lambda: inference_rows(subject, options.batch_size, options.rounds)),
        ("merging machinery", lambda: machinery_rows(subject, options.batch_size, options.rounds)),
    ]
    if options.device.startswith("cuda"):
        stages += [
            ("graphed forward", lambda: inference_rows(subject, options.batch_size, options.rounds, "graphed")),
            ("graphed machinery", lambda: machinery_rows(subject, options.batch_size, options.rounds, "graphed")),
        ]
    if options.compile:
        compiled = partial(inference_rows, subject, options.batch_size, options.rounds, "compiled")
        stages += [("compiled forward", compiled), ("compile time", lambda: compile_rows(subject, options.batch_size))]
    if options.training:
        stages.append(("training", lambda: training_rows(subject, options.train_batch_size, options.train_rounds)))
    return _finish(_run(stages), options)


def _kernels(arguments: Sequence[str]) -> int:
    options = _options(
        KernelOptions,
        arguments,
        "kernels",
        description=(
            "Time matching, merging and attention with a size bias, at layer shapes of ViT-B, ViT-L and DINOv2-S,\n"
            "against plain PyTorch ('/ eager', '/ compiled': how many times faster) and against a copy ('copy': share\n"
            "of its bandwidth). First every kernel is checked against a reference in float64: one that fails stops\n"
            "the benchmark. On a CPU the check runs in Triton's interpreter, and what is timed is the plain PyTorch\n"
            "that runs there, as an operator: '/ eager' is then what calling an operator costs."
        ),
        example="pyra benchmark kernels --device cpu --quick\n  pyra benchmark kernels --device cuda",
    )
    batches = options.batch_sizes or ([1, 4] if options.quick else [1, 32, 256])
    if min(batches) < 1:
        raise ConfigError("--batch-sizes must be at least 1")
    options.batch_sizes, options.rounds = batches, min(options.rounds, 5) if options.quick else options.rounds
    device = _start(options)
    import torch
    from tqdm import tqdm

    from pyra.tasks.benchmarks import kernels

    subjects = [kernels.SUBJECTS[0], kernels.SUBJECTS[4]] if options.quick else kernels.SUBJECTS
    shapes = [kernels.Shape.of(subject) for subject in subjects]
    print("checking every kernel against its reference ...", file=sys.stderr)
    kernels.check(shapes, device)
    bandwidth = kernels.copy_bandwidth(device, options.rounds)
    print(f"all agree; a copy moves {bandwidth / 1e9:.0f} GB/s", file=sys.stderr)
    rows = []
    cases = [(shape, batch) for shape in shapes for batch in batches]
    for shape, batch in tqdm(cases, unit="shape", disable=None):
        dtype = getattr(torch, options.dtype)
        rows += kernels.rows_of(shape, batch, device, dtype, options.rounds, options.compile, bandwidth)
    return _finish(rows, options)


def _adapters(arguments: Sequence[str]) -> int:
    options = _options(
        AdapterOptions,
        arguments,
        "adapters",
        description=(
            "Time loading and switching adapters against PEFT's own ('/ peft': how many times faster), and training\n"
            "steps at rates from 0.3 to 0.8 against as many at the middle ('/ fixed-rate share': times as long)."
        ),
        example="pyra benchmark adapters --backbone vit_base_patch16_224",
    )
    _start(options)
    from pyra.tasks.benchmarks.adapters import elastic_rows, loading_rows, switching_rows
    from pyra.tasks.benchmarks.subject import Subject

    subject = Subject(options.backbone, options.image_size, options.device, options.dtype)
    subject.shapes()  # says what cannot be before anything is timed
    stages: list[tuple[str, Callable[[], list[Any]]]] = [
        ("loading", lambda: loading_rows(subject, options.rounds)),
        ("switching", lambda: switching_rows(subject, options.rounds)),
        ("elastic training", lambda: elastic_rows(subject, options.batch_size, options.rounds)),
    ]
    return _finish(_run(stages), options)


def _experts(arguments: Sequence[str]) -> int:
    options = _options(
        ExpertOptions,
        arguments,
        "experts",
        description=(
            "Train LoRA on the routed experts of one decoder layer, with ExpertLoraConfig and with PEFT's\n"
            "target_parameters, in turns: a forward with its backward ('/ peft': how many times faster), and its peak\n"
            "memory above the loaded model ('/ peft share': times as much), each in a process of its own. First both\n"
            "are compared with equal factors: where they differ nothing is timed."
        ),
        example="pyra benchmark experts --experts 128 --tokens 256 --rank 16",
    )
    if options.hidden % 8 or options.intermediate % 8:
        raise ConfigError("--hidden and --intermediate must be multiples of 8, which grouped products need")
    _start(options)
    from pyra.tasks.benchmarks.experts import Mixture, check, memory_rows, step_rows

    sizes = {name: value for name, value in vars(options).items() if name not in ("rounds", "threads", "output")}
    mixture = Mixture(**sizes)
    check(mixture)
    stages: list[tuple[str, Callable[[], list[Any]]]] = [
        ("training step", lambda: step_rows(mixture, options.rounds)),
        ("peak memory", lambda: memory_rows(mixture)),
    ]
    return _finish(_run(stages), options)


def _decoder(arguments: Sequence[str]) -> int:
    from pyra.tasks.benchmarks.decoder_options import DecoderOptions

    options = _options(
        DecoderOptions,
        arguments,
        "decoder",
        description=(
            "Read prompts and answer them with a language model that merges them, and as it is, in turns: time of the\n"
            "prefill and of the first token, speed of the answer, bytes of the cache, peak memory above the loaded\n"
            "model ('/ rate 0': how many times faster, or which share). First answers from the cache are compared\n"
            "with those of one forward: where they differ nothing is timed."
        ),
        example=(
            "pyra benchmark decoder --backbone FOLDER --prompt-tokens 512,1024,2048 --rate 0,0.5,0.75\n"
            "  pyra benchmark decoder --backbone joyai-llm-flash --device cuda --dtype bfloat16"
        ),
    )
    _start(options)
    from pyra.tasks.benchmarks.decoder import decoder_rows
    from pyra.tasks.benchmarks.decoder_subject import check_options
    from pyra.tasks.benchmarks.decoder_table import summary

    check_options(options)
    rows = decoder_rows(options)
    folder, text = Path(options.backbone).name, options.data and Path(options.data).name  # not where they lie here
    return _finish(rows, replace(options, backbone=folder, data=text), summary)


def _input(arguments: Sequence[str]) -> int:
    options = _options(
        InputOptions,
        arguments,
        "input",
        description=(
            "Time training steps on images as they come from the data set, with and without RandAugment, against the\n"
            "same steps on batches that lie in memory, in turns ('/ in-memory share': times as long)."
        ),
        example="pyra benchmark input --backbones demo,vit_small_patch16_224",
    )
    _start(options)
    from pyra.tasks.benchmarks.input import input_rows
    from pyra.tasks.benchmarks.subject import Subject
    from pyra.tasks.runs import DEMO_BACKBONE

    stages: list[tuple[str, Callable[[], list[Any]]]] = []
    for name in options.backbones:
        subject = Subject(str(DEMO_BACKBONE) if name == "demo" else name, None, options.device, options.dtype)
        subject.shapes()  # says what cannot be before anything is timed
        stages.append((name, partial(input_rows, subject, options.batch_size, options.rounds, name)))
    return _finish(_run(stages), options)


def _exports(arguments: Sequence[str]) -> int:
    options = _options(
        ExportsOptions,
        arguments,
        "exports",
        description=(
            "Export a plain and a merging model to ONNX, in float32 and int8, and time them in onnxruntime and\n"
            "OpenVINO, in turns ('/ plain', '/ float32': how many times faster); and measure what an export takes."
        ),
        example="pyra benchmark exports --backbone vit_base_patch16_224 --batch-sizes 1,16",
    )
    if min(options.batch_sizes) < 1:
        raise ConfigError("--batch-sizes must be at least 1")
    _start(options)
    from pyra.tasks.benchmarks.exports import cost_rows, speed_rows
    from pyra.tasks.benchmarks.subject import Subject

    subject = Subject(options.backbone, options.image_size)
    subject.shapes()  # says what cannot be before anything is timed
    stages: list[tuple[str, Callable[[], list[Any]]]] = [
        ("cost of an export", lambda: cost_rows(subject)),
        ("speed of exports", lambda: speed_rows(subject, options.batch_sizes, options.rounds)),
    ]
    return _finish(_run(stages), options)


def _serve(arguments: Sequence[str]) -> int:
    options = parse(
        ServeOptions,
        arguments,
        prog="pyra benchmark serve",
        description="Send images to a server from many clients at once: answers, refusals, latency, its memory.",
        example="pyra benchmark serve http://127.0.0.1:8080 --clients 64 --image photo.jpg",
        positional="url",
    )
    problems = bound_problems(options, _COUNT, ["clients"]) + bound_problems(options, ABOVE_0, ["seconds"])
    if not options.url:
        problems.append("URL is missing: give the address that pyra serve has printed")
    if not options.image:
        problems.append("--image is missing: give an image to send")
    if problems:
        raise ConfigError("; ".join(problems))
    _can_be_written(options.output)
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.benchmarks.serving import load_test

    result = load_test(options.url, Path(options.image).read_bytes(), options.clients, options.seconds)
    print(
        tabulate([(name.replace("_", " "), value) for name, value in asdict(result).items() if value not in (None, {})])
    )
    write_json(options.output, result)
    return 0 if result.answered and not result.failed else 1


def _run(stages: Sequence[tuple[str, Callable[[], list[Any]]]]) -> list[Any]:
    rows = []
    for number, (name, stage) in enumerate(stages, start=1):
        print(f"[{number}/{len(stages)}] {name}", file=sys.stderr, flush=True)
        rows += stage()
    return rows


def _options(kind: type[Options], arguments: Sequence[str], verb: str, description: str, example: str) -> Options:
    """Parse, and check what all verbs have: counts, the device, and a file that can be written."""
    prog = f"pyra benchmark {verb}"
    options: Any = parse(kind, arguments, prog=prog, description=description, example=example)
    counts = [name for name, value in vars(options).items() if type(value) is int]
    problems = bound_problems(options, _COUNT, counts)
    if re.fullmatch(DEVICES, options.device) is None or options.device == "auto":
        problems.append(f"--device must be cpu, cuda or cuda:NUMBER, got {options.device!r}")
    if problems:
        raise ConfigError("; ".join(problems))
    _can_be_written(options.output)
    checked: Options = options
    return checked


def _can_be_written(output: str) -> None:
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _start(options: Any) -> Any:
    """Return the device, with the threads set."""
    import torch

    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {options.device}: {torch.cuda.device_count()} CUDA devices are here; use cpu")
    return device


def _finish(rows: list[Any], options: Any, show: Callable[[list[Any]], str] | None = None) -> int:
    from pyra.tasks.benchmarks.rows import table, write_rows
    from pyra.tasks.results import environment

    here = environment(options.device)
    rows = [replace(row, environment=here) for row in rows]
    print((show or table)(rows))
    settings = {name: value for name, value in asdict(options).items() if name != "output"}  # a path of this machine
    write_rows(options.output, rows, settings)
    print(f"\n{len(rows)} rows in {options.output} ({here['device']}, torch {here['torch']})")
    return 0

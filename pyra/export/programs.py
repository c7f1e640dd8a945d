"""``torch-export``: an ExportedProgram, which PyTorch runs and compiles without the classes of its backbone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyra.errors import ExportError
from pyra.export.archive import refuse_code
from pyra.export.loading import damaged
from pyra.export.logits import LogitsOnly

if TYPE_CHECKING:
    from pyra.export.exporting import Job
    from pyra.export.record import ExportRecord

_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def traced(model: nn.Module, job: Job) -> Any:
    """Return an ExportedProgram from pixel values [B, 3, H, W] to logits [B, classes], ``B`` free.

    Raises:
        ExportError: for a model that torch cannot trace so, with its reason.
    """
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.export(LogitsOnly(model), (job.example[:2],), dynamic_shapes=shapes)
    except Exception as error:  # torch raises whatever came up in the model
        raise ExportError(f"torch.export cannot trace this model: {' '.join(str(error).split())[:300]}") from None
    _forget_origins(program)
    return program


def write(model: nn.Module, staging: Path, job: Job) -> None:
    """Write a folded model."""
    program = traced(model, job)
    program._example_inputs = None  # images of the user's data set have no place in the file
    torch.export.save(program, staging / job.format.file)


def open_file(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Callable[[Tensor], Tensor]:
    """Open ``model.pt2``; raises :class:`ExportError` where it is damaged or could run code."""
    path = folder / "model.pt2"
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # the error says it
        refuse_code(path)
        program: nn.Module = torch.export.load(path).module()
    except ExportError:
        raise
    except Exception as error:  # of a damaged archive: nearly anything
        raise damaged(path, error) from None
    finally:
        logger.setLevel(level)
    return with_threads(program, threads)


def with_threads(run: Callable[[Tensor], Tensor], threads: int | None) -> Callable[[Tensor], Tensor]:
    """Return ``run`` with PyTorch's number of threads set for its calls."""
    if threads is None:
        return run

    def call(pixel_values: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run(pixel_values)
        finally:
            torch.set_num_threads(before)

    return call


def _forget_origins(program: Any) -> None:
    """Drop what names source files and modules of the exporting machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in _ORIGINS:
                    node.meta.pop(key, None)

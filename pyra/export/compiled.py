"""``aoti``: a package of machine code that AOTInductor compiled, which runs from C++ without Python."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, ExportError
from pyra.export.loading import damaged
from pyra.export.programs import traced, with_threads

if TYPE_CHECKING:
    from pyra.export.exporting import Job
    from pyra.export.record import ExportRecord

_COMPILERS = ("g++", "clang++", "c++")


def write(model: nn.Module, staging: Path, job: Job) -> None:
    """Compile a folded model for this machine's CPU.

    Raises:
        ConfigError: where there is no C++ compiler.
    """
    if not any(map(shutil.which, _COMPILERS)):
        raise ConfigError("the format aoti compiles C++ code and found no compiler: install g++ or clang++")
    program = traced(model, job)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch._inductor.aoti_compile_and_package(program, package_path=str(staging / job.format.file))
    except Exception as error:  # the compiler's, or torch's own of any class
        raise ExportError(f"AOTInductor cannot compile this model: {' '.join(str(error).split())[:300]}") from None


def open_file(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Callable[[Tensor], Tensor]:
    """Open ``model.pt2``, which runs its code: callers have asked whether it is trusted."""
    path = folder / "model.pt2"
    try:
        model = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise damaged(path, error) from None
    return with_threads(lambda pixel_values: _only(model(pixel_values.contiguous())), threads)


def _only(output: Tensor | list[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]

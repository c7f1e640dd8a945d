"""Which implementation runs: plain PyTorch, or Triton kernels on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyra.errors import KernelError

BACKENDS: tuple[str, ...] = ("auto", "reference", "triton")

_TELLS_EXPORTS_APART = torch.__version__ >= (2, 12)  # type: ignore[operator]
_INSTALLED = importlib.util.find_spec("triton") is not None
# What blocks of `backend` that are open chose, the newest last: [a name each].
_open: list[list[str]] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of matching and merging for a block of code.

    The choice is the process's: other threads see it, too. A configuration that names a backend keeps it. The choice
    counts when an operator runs, in a compiled model as well; where a compiler traced plain functions instead of
    operators, nothing changes any more.

    Args:
        name: ``"auto"``, Triton on a GPU where its kernels agree with plain PyTorch (checked once in a process, at
            their first use), else plain PyTorch; ``"reference"``, plain PyTorch; ``"triton"``, Triton or an error. On
            a CPU Triton runs only in its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        KernelError: for another name, or where Triton was asked for and cannot run.

    Example:
        >>> with backend("reference"):
        ...     pass
    """
    if name not in BACKENDS:
        raise KernelError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and (reason := _no_triton()):
        raise KernelError(f"backend 'triton' cannot run: {reason}; use 'auto' or 'reference'")
    mine = [name]
    _open.append(mine)
    try:
        yield
    finally:
        _open[:] = [entry for entry in _open if entry is not mine]  # blocks of other threads may end in any order


def as_operator(tensor: Tensor, name: str = "auto") -> bool:
    """Whether matching and merging run as the operators of this package, in a graph or at once.

    ``name`` is the backend asked for; ``"auto"`` leaves it to :func:`backend`.

    An exported graph holds plain operators, which run anywhere. A compiler for CPUs gets operators: every layer has its
    own number of tokens, so no two layers share a compiled kernel, and traced one by one the many small operations of
    a merging step would keep the C++ compiler busy far longer than the rest of the model.

    Raises:
        KernelError: where Triton was asked for and cannot run on the tensor's device.
    """
    if exporting():
        return False
    return compiled_on_a_cpu(tensor) or _may_run_triton(tensor, _asked_for(name))


def compiled_on_a_cpu(tensor: Tensor) -> bool:
    """Whether a compiler for CPUs traces; an exporter wants plain operators."""
    return tensor.device.type == "cpu" and torch.compiler.is_compiling() and not exporting()


def exporting() -> bool:
    """Whether ``torch.export`` traces, with anything but its ``strict=True`` in PyTorch 2.11.

    There the question alone is answered yes in every graph that a compiler traces.
    """
    return torch.compiler.is_exporting() and (_TELLS_EXPORTS_APART or not torch.compiler.is_dynamo_compiling())


def at_once(*tensors: Tensor | None) -> bool:
    """Whether a function may do its work without being an operator, whose call takes the host longer than a launch.

    It may where nothing but its result is wanted: no gradient, no graph, and no mode or subclass (fake tensors, a
    counter of operations) that watches operators.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the precision that autocast computes in on a type of device, or None where it does not."""
    # PyTorch 2.11 cannot compile the second question.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None


def runs_triton(tensor: Tensor, name: str = "auto") -> bool:
    """Whether Triton's kernels are to be used for a tensor; ``name`` as in :func:`as_operator`.

    This is for the operators, which no compiler traces: with ``"auto"`` the kernels run here for the first time, and
    where they do not agree with the references, plain PyTorch goes on and a warning says so.

    Raises:
        KernelError: where Triton was asked for and cannot run on the tensor's device.
    """
    asked = _asked_for(name)
    return _may_run_triton(tensor, asked) and (asked == "triton" or _agrees(tensor.device))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one: Triton launches there, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _asked_for(name: str) -> str:
    return _open[-1][0] if name == "auto" and _open else name


def _may_run_triton(tensor: Tensor, asked: str) -> bool:
    if asked == "reference":
        return False
    if torch.compiler.is_compiling():  # whatever else there is to ask, the operator asks when it runs
        return asked == "triton" or (tensor.device.type == "cuda" and _INSTALLED and tensor.dtype != torch.float64)
    reason = _no_triton_on(tensor, asked)
    if reason is not None and asked == "triton":
        raise KernelError(f"backend 'triton' cannot run: {reason}; use 'auto' or 'reference'")
    if reason is not None and tensor.device.type == "cuda":
        _say_once(f"pyra: merging runs in plain PyTorch on this GPU: {reason}")
    return reason is None


def _no_triton_on(tensor: Tensor, asked: str) -> str | None:
    device = tensor.device.type
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32, and the tensors are float64"
    if device == "cuda" or (device == "cpu" and interpreted() and asked == "triton"):
        return _no_triton(tensor.device if device == "cuda" else None)
    return f"the tensors are on {device}" + (", and TRITON_INTERPRET=1 is not set" if device == "cpu" else "")


@cache
def _no_triton(device: torch.device | None = None) -> str | None:
    """What keeps Triton from running in this process, on a device (None: the current one), or None."""
    if not _INSTALLED:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (to try it on a CPU, start Python with TRITON_INTERPRET=1)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


@cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernels do on a device what the references do."""
    checks = importlib.import_module("pyra.kernels.checks")  # which imports the operators, and those this module
    with on_device_of(torch.empty(0, device=device)):
        reason = checks.disagreement(device)
    if reason is not None:
        _say_once(f"pyra: merging runs in plain PyTorch on {device}: Triton's kernels failed their check: {reason}")
    return reason is None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)

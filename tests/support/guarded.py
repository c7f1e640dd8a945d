"""Tensors with a page on either side that no access survives; what runs the kernels on them, in a process of its own.

Triton's interpreter reads and writes real addresses, so a kernel that touches a byte outside its tensors would mostly
go unnoticed. Here it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[object] = []


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """Return a tensor that ends (or starts) where a forbidden page does."""
    count = int(torch.Size(shape).numel())
    size = max(count * dtype.itemsize, 1)
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    _kept.append(memory)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


@contextmanager
def all_new_tensors(at_end: bool):  # type: ignore[no-untyped-def]
    """Guard what the launchers make, too."""
    empty, zeros, like = Tensor.new_empty, Tensor.new_zeros, torch.empty_like

    def shape_of(shape: tuple[object, ...]) -> tuple[int, ...]:
        return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)  # type: ignore

    def new_empty(self: Tensor, *shape: object, dtype: torch.dtype | None = None, **rest: object) -> Tensor:
        if rest:  # the interpreter's own, which it sets to the memory of another
            return empty(self, *shape, **rest)  # type: ignore[call-overload, no-any-return]
        made = guarded(shape_of(shape), dtype or self.dtype, at_end)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1 << 20)

    def new_zeros(self: Tensor, *shape: object, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(shape_of(shape), dtype or self.dtype, at_end).zero_()

    Tensor.new_empty, Tensor.new_zeros = new_empty, new_zeros  # type: ignore[method-assign, assignment]
    torch.empty_like = lambda x: new_empty(x, *x.shape)  # type: ignore[assignment]
    try:
        yield
    finally:
        Tensor.new_empty, Tensor.new_zeros, torch.empty_like = empty, zeros, like  # type: ignore[method-assign]


def moved(tensor: Tensor | None, at_end: bool) -> Tensor | None:
    """Copy a tensor to where a forbidden page is."""
    return None if tensor is None else guarded(tuple(tensor.shape), tensor.dtype, at_end).copy_(tensor)


def run(cases: Callable[[Callable[[Tensor | None], Tensor | None]], None]) -> None:
    """Run ``cases`` with tensors guarded behind, then before."""
    for at_end in (True, False):
        with all_new_tensors(at_end):
            cases(lambda tensor: moved(tensor, at_end))  # noqa: B023


def beyond(place: int) -> None:
    """Read one element outside a guarded tensor: this must not return."""
    x = guarded((16,), torch.float32, at_end=place >= 0)
    ctypes.c_float.from_address(x.data_ptr() + 4 * (16 + place if place >= 0 else place)).value  # noqa: B018
    sys.exit(0)

"""The bias of proportional attention, ``log(size)``, as one operator: ``pyra::size_bias``.

:func:`bias` chooses how it runs, as in :mod:`pyra.kernels.match`. The operator runs :func:`reference`, or
:mod:`pyra.kernels.bias_triton` where Triton was chosen. Sizes are counts, so there is no gradient.

Letters: ``B`` batch, ``N`` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyra.kernels.choice import as_operator, at_once, compiled_on_a_cpu, on_device_of, runs_triton


def bias(size: Tensor, dtype: torch.dtype, lowest: float, backend: str = "auto") -> Tensor:
    """Return ``log(size)`` [B, 1, 1, N].

    Args:
        size: [B, N, 1] patches each token stands for, whole numbers or floating point; 0 marks padding.
        dtype: of the result; the logarithm is taken in float32 at least.
        lowest: what padding gets. Not -inf: were all tokens padding, the softmax would be 0 / 0.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
    """
    trained = compiled_on_a_cpu(size) and torch.is_grad_enabled()
    if as_operator(size, backend) and not trained:
        run = _run if at_once(size) else torch.ops.pyra.size_bias
        result: Tensor = run(size, dtype, lowest, backend)
        return result
    return reference(size, dtype, lowest)


def reference(size: Tensor, dtype: torch.dtype, lowest: float) -> Tensor:
    """Take the logarithm in plain PyTorch."""
    wide = torch.promote_types(dtype, torch.float32)
    wide = torch.promote_types(size.dtype, wide) if size.is_floating_point() else wide
    return size.to(wide).log().clamp_min(lowest).to(dtype).transpose(1, 2).unsqueeze(1)


def _run(size: Tensor, dtype: torch.dtype, lowest: float, backend: str) -> Tensor:
    if dtype != torch.float64 and runs_triton(size, backend):
        from pyra.kernels.bias_triton import size_bias

        with on_device_of(size):
            return size_bias(size, dtype, lowest)
    return reference(size, dtype, lowest).contiguous()


_operator = torch.library.custom_op("pyra::size_bias", _run, mutates_args=())


@_operator.register_fake
def _shape(size: Tensor, dtype: torch.dtype, lowest: float, backend: str) -> Tensor:
    return size.new_empty(size.shape[0], 1, 1, size.shape[1], dtype=dtype)

"""Attention in which every key counts as the tokens it stands for, as one operator: ``pyra::attend_sizes``.

The softmax weighs each key with its size (ToMe, arXiv 2210.09461, equation 1, where the logarithm of the size is added
to the score). It has no gradients. The operator runs :func:`reference`, or :mod:`pyra.kernels.attend_triton` where
Triton was chosen.

Letters: ``B`` batch, ``H`` heads, ``M`` queries, ``N`` tokens, ``d`` head channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyra.kernels import bias
from pyra.kernels.choice import as_operator, at_once, compiled_on_a_cpu, on_device_of, runs_triton

WIDEST = 128  # channels of a head that a program holds
_HALVES = (torch.bfloat16, torch.float16)  # in float32 the kernels of the mask are as fast


def takes(query: Tensor, key: Tensor, value: Tensor, size: Tensor, backend: str = "auto") -> bool:
    """Whether :func:`attend` is the way for these: on a GPU, in half precision, without gradients.

    Raises:
        KernelError: where Triton was asked for and cannot run on the tensors' device.
    """
    parts = (query, key, value)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return False
    if any(part.ndim != 4 or part.dtype not in _HALVES or part.dtype != query.dtype for part in parts):
        return False
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or not query.shape[3] == key.shape[3] == value.shape[3]:
        return False
    fits = key.shape[2] == value.shape[2] == size.shape[1] and query.shape[3] <= WIDEST
    return fits and not compiled_on_a_cpu(query) and as_operator(query, backend)


def attend(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float, backend: str = "auto") -> Tensor:
    """Attend, each key weighed with its size.

    Args:
        query: [B, H, M, d], of any strides, as all are.
        key: [B, H, N, d].
        value: [B, H, N, d].
        size: [B, N, 1] whole numbers or floating point; 0 marks padding, which nobody sees.
        scale: of the scores.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [B, H, M, d], heads beside each other in memory.
    """
    run = _run if at_once(query, key, value, size) else torch.ops.pyra.attend_sizes
    result: Tensor = run(query, key, value, size, scale, backend)
    return result


def reference(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    """Attend in plain PyTorch, with the logarithm of the sizes as a mask."""
    mask = bias.reference(size, query.dtype, torch.finfo(query.dtype).min)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _run(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float, backend: str) -> Tensor:
    if runs_triton(query, backend):
        from pyra.kernels.attend_triton import attend_sizes

        with on_device_of(query):
            return attend_sizes(query, key, value, size, scale)
    return reference(query, key, value, size, scale).transpose(1, 2).contiguous().transpose(1, 2)


_operator = torch.library.custom_op("pyra::attend_sizes", _run, mutates_args=())


@_operator.register_fake
def _shape(query: Tensor, *_: object) -> Tensor:
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels).transpose(1, 2)

"""The bias of proportional attention on a GPU: one pass over the sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_A_PROGRAM = 512
WARPS = 4


@triton.jit
def bias_kernel(size, out, tokens, lowest, stride_b, stride_n, TILE: tl.constexpr):
    """Write the logarithms of some sizes of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    count = tl.load(size + sample * stride_b + token.to(tl.int64) * stride_n, mask=inside, other=1).to(tl.float32)
    value = tl.where(count == 0, lowest, tl.log(tl.where(count == 0, 1.0, count)))
    value = tl.where(value < lowest, lowest, value)  # what is no number stays none
    tl.store(out + sample * tokens + token, value.to(out.dtype.element_ty), mask=inside)


def size_bias(size: Tensor, dtype: torch.dtype, lowest: float) -> Tensor:
    """Take logarithms as :func:`pyra.kernels.bias.reference` does, in float32; sizes of any strides."""
    batch, tokens = size.shape[:2]
    out = size.new_empty(batch, 1, 1, tokens, dtype=dtype)
    if batch and tokens:
        bias_kernel[(batch, triton.cdiv(tokens, TOKENS_A_PROGRAM))](
            size, out, tokens, lowest, *size.stride()[:2], TILE=TOKENS_A_PROGRAM, num_warps=WARPS
        )
    return out

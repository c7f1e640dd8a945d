"""Proportional attention: a token that stands for ``s`` patches attracts the attention of ``s`` tokens.

``log(size)`` of the key is added to the attention scores (ToMe, arXiv 2210.09461, equation 1). It travels as the
additive mask of ``scaled_dot_product_attention``, [B, 1, 1, N] and broadcast over heads and queries, so the fused
kernels stay in use and no N x N matrix is held in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the attention bias ``log(size)`` of the key tokens.

    Args:
        size: [B, N, 1] patches each token stands for, or None while all sizes are 1.
        dtype: dtype of the queries (the logarithm is taken in the dtype of ``size``).

    Returns:
        [B, 1, 1, N], or None for None: no mask until some size exceeds 1.
    """
    if size is None:
        return None
    # Padding, of size 0, gets the lowest number: were all tokens padding, -inf would make the softmax 0 / 0.
    return size.log().clamp_min(torch.finfo(dtype).min).to(dtype).transpose(1, 2).unsqueeze(1)

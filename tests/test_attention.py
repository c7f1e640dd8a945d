"""Proportional attention: a token of size s attracts what s copies of it would."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyra.attention import size_bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_size_is_the_number_of_copies(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([[1, 3, 2, 7], [5, 1, 1, 4]])
    query, key, value = (torch.randn(2, 3, 4, 8, dtype=dtype) for _ in range(3))
    bias = size_bias(counts[..., None].to(dtype), dtype)
    assert bias is not None and bias.shape == (2, 1, 1, 4) and bias.dtype == dtype
    merged = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    for sample, repeats in enumerate(counts):
        one = slice(sample, sample + 1)
        copied = [tensor[one].repeat_interleave(repeats, dim=2) for tensor in (key, value)]
        expected = scaled_dot_product_attention(query[one], *copied)
        torch.testing.assert_close(merged[one], expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(merged, scaled_dot_product_attention(query, key, value), atol=1e-2)


def test_ones_change_nothing() -> None:
    bias = size_bias(torch.ones(2, 5, 1), torch.float32)
    assert bias is not None and not bias.any()


def test_no_sizes_no_mask() -> None:
    assert size_bias(None, torch.float32) is None


def test_the_logarithm_is_taken_in_the_precision_of_the_sizes() -> None:
    size = torch.tensor([[[257.0], [300.0], [301.0]]])  # bfloat16 has no 257 and no 301
    bias = size_bias(size, torch.bfloat16)
    assert bias is not None and bias.dtype == torch.bfloat16
    assert torch.equal(bias.flatten(), size.flatten().log().bfloat16())

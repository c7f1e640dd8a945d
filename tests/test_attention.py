"""Proportional attention: a token of size s attracts what s copies of it would."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyra.attention import SizeBias, augmented, proportional, size_bias
from pyra.errors import UnsupportedModelError


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


WAYS = ("augmented", "flex")
flex_on_a_cpu = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def drawn(head: int, value: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of 2 samples, 3 heads and 33 tokens, and sizes of which one in eleven is padding."""
    generator = torch.Generator().manual_seed(head)
    query, key, values = (
        torch.randn(2, 3, 33, width, generator=generator).to(dtype) for width in (head, head, value or head)
    )
    size = torch.randint(1, 600, (2, 33, 1), generator=generator, dtype=torch.int32)
    return query, key, values, size * (torch.arange(33) % 11 != 5)[None, :, None]


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("head", "value"), [(64, 64), (72, 72), (61, 61), (8, 8), (16, 32)])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_other_ways_are_the_mask(way: str, head: int, value: int, scale: float | None) -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        query, key, values, size = drawn(head, value, dtype)
        expected = scaled_dot_product_attention(
            query.double(), key.double(), values.double(), proportional(size, torch.float64), scale=scale
        )
        found = scaled_dot_product_attention(query, key, values, attn_mask=proportional(size, dtype, way), scale=scale)
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [64, 72, 256])
def test_half_precision_errs_no_more_than_twice_the_mask(head: int, dtype: torch.dtype, way: str) -> None:
    query, key, values, size = drawn(head, dtype=dtype)
    exact = scaled_dot_product_attention(
        query.double(), key.double(), values.double(), proportional(size, torch.float64)
    )
    masked = scaled_dot_product_attention(query, key, values, attn_mask=proportional(size, dtype))
    found = scaled_dot_product_attention(query, key, values, attn_mask=proportional(size, dtype, way))
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 2 * (masked - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channels_hold_the_bias_to_more_than_their_precision(dtype: torch.dtype) -> None:
    query, key, values, _ = drawn(64, dtype=dtype)
    bias = torch.linspace(0, 7.3, 33).expand(2, 1, 1, 33)
    wide_query, wide_key, wider = augmented(query, key, values, bias, 0.125)
    assert wide_query.shape[-1] == wide_key.shape[-1] == wider.shape[-1] == 72
    added = 0.125 * (wide_query.double() @ wide_key.double().mT - query.double() @ key.double().mT)
    assert (added - bias).abs().max() < 2e-6  # one part alone would be off by 0.03 (bfloat16)
    assert (0.125 * 8 * wide_key[..., 64].double() - bias[:, 0]).abs().max() > 1e-4


def test_padding_is_seen_by_nobody() -> None:
    query, key, values, size = drawn(16)
    other = values.masked_fill((size == 0)[:, None], 1e4)
    bias = proportional(size, torch.float32, "augmented")
    found = [scaled_dot_product_attention(query, key, each, attn_mask=bias) for each in (values, other)]
    assert torch.equal(*found)


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
def test_a_sample_of_padding_alone_stays_finite(way: str) -> None:
    query, key, values, size = drawn(16, dtype=torch.float16)
    bias = proportional(torch.zeros_like(size), torch.float16, way)
    assert scaled_dot_product_attention(query, key, values, attn_mask=bias).isfinite().all()


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
def test_autocast_rounds_no_part_of_a_bias(way: str) -> None:
    query, key, values, size = drawn(64)
    exact = scaled_dot_product_attention(
        *(part.bfloat16().double() for part in (query, key, values)), proportional(size, torch.float64)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(query, key, values, attn_mask=proportional(size, torch.float32, way))
        masked = scaled_dot_product_attention(query, key, values, attn_mask=proportional(size, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 2 * (masked - exact).abs().max()


def test_what_a_size_bias_is_not() -> None:
    query, key, values, size = drawn(16)
    bias = proportional(size, torch.float32, "augmented")
    assert isinstance(bias, SizeBias)
    with pytest.raises(UnsupportedModelError, match="causal"):
        scaled_dot_product_attention(query, key, values, attn_mask=bias, is_causal=True)
    with pytest.raises(TypeError):
        torch.add(query, bias)  # type: ignore[call-overload]


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 5000.0])
def test_scales_that_queries_cannot_hold_are_masked(way: str, scale: float) -> None:
    query, key, values, size = drawn(16)
    expected = scaled_dot_product_attention(query, key, values, proportional(size, torch.float32), scale=scale)
    found = scaled_dot_product_attention(query, key, values, proportional(size, torch.float32, way), scale=scale)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_no_samples_and_no_memory(way: str) -> None:
    query, key, values, size = (part[:0] for part in drawn(16))
    assert scaled_dot_product_attention(query, key, values, proportional(size, torch.float32, way)).shape == query.shape
    there = [part.to("meta") for part in drawn(16)]
    bias = proportional(there.pop(), torch.float32, "augmented")
    assert scaled_dot_product_attention(*there, attn_mask=bias).shape == (2, 3, 33, 16)


@flex_on_a_cpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_below_any_score(way: str, dtype: torch.dtype) -> None:
    query, key, values, size = drawn(16, dtype=dtype)
    bias, other = proportional(size, dtype, way), values.masked_fill((size == 0)[:, None], 1e4)
    found = [scaled_dot_product_attention(300 * query, 300 * key, each, attn_mask=bias) for each in (values, other)]
    assert torch.equal(*found)

"""Re-activation: the equations against a direct formula in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyra import Reactivation
from pyra.reactivation import reactivate
from pyra.schedule import preset_schedule


def random_weights(rows: int, dim: int) -> Reactivation:
    torch.manual_seed(0)
    weights = Reactivation(rows, dim, dtype=torch.float64)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter)
    return weights


def formula(source: Tensor, pairs: Tensor, weights: Reactivation) -> Tensor:
    """Equations 5 to 8 of the paper, one number at a time."""
    _, count, dim = pairs.shape
    w_r, w_d = weights.pair_weight[:, 0].tolist(), weights.channel_weight[0].tolist()
    gain, shift = weights.norm.weight.tolist(), weights.norm.bias.tolist()
    result = source.clone()
    for sample, rows in enumerate(pairs.tolist()):
        info = []
        for row in rows:
            mean = sum(row) / dim
            spread = math.sqrt(sum((v - mean) ** 2 for v in row) / dim + 1e-5)
            info.append([(v - mean) / spread * gain[c] + shift[c] for c, v in enumerate(row)])
        for rank in range(count):
            token = sum(info[rank][c] * w_d[c] for c in range(dim))
            for c in range(dim):
                channel = sum(w_r[i] * info[i][c] for i in range(min(count, len(w_r))))
                gate = (2 * sigmoid(token) - 1) * 2 * sigmoid(channel)
                result[sample, rank, c] += gate * source[sample, rank, c]
    return result


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("rows", [1, 3, 5, 9], ids=lambda rows: f"{rows}_rows_for_5_pairs")
def test_equations(rows: int) -> None:
    weights = random_weights(rows, 4)
    source, pairs = torch.randn(2, 5, 4, dtype=torch.float64), 3 * torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        result = weights(source, pairs)
        torch.testing.assert_close(result, formula(source, pairs, weights), rtol=1e-12, atol=1e-12)
        assert torch.equal(result, reactivate(source, pairs, weights))
    assert not torch.allclose(result, source, atol=1e-2)


def test_pairs_past_the_last_row_do_not_change_the_others() -> None:
    weights = random_weights(3, 4)
    source, pairs = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(weights(source, pairs)[:, :3], weights(source[:, :3], pairs[:, :3]), rtol=1e-12, atol=0)


def test_linear_in_the_source() -> None:
    weights = random_weights(3, 4)
    source, pairs = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(weights(7 * source, pairs), 7 * weights(source, pairs), rtol=1e-12, atol=0)


def test_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    weights = Reactivation(40, 8)
    assert weights.channel_weight.shape == (1, 8) and not weights.channel_weight.any()
    assert weights.pair_weight.shape == (40, 1) and weights.pair_weight.abs().max() <= 1
    assert weights.pair_weight.min() < -0.5 and weights.pair_weight.max() > 0.5
    assert weights.norm.eps == 1e-5 and weights.norm.weight.eq(1).all() and not weights.norm.bias.any()
    assert all(parameter.requires_grad for parameter in weights.parameters())
    source = torch.randn(2, 40, 8)
    assert torch.equal(weights(source, torch.randn(2, 40, 8)), source)


def test_reset_parameters_starts_anew() -> None:
    weights = random_weights(4, 3)
    before = weights.pair_weight.detach().clone()
    weights.reset_parameters()
    assert not weights.channel_weight.any() and weights.norm.weight.eq(1).all() and not weights.norm.bias.any()
    assert not torch.equal(weights.pair_weight, before) and weights.pair_weight.abs().max() <= 1


def test_parameters_of_the_published_model() -> None:
    layers = [Reactivation(removed, 768) for removed in preset_schedule("vit_base_patch16_224", "high")]
    assert sum(parameter.numel() for layer in layers for parameter in layer.parameters()) == 27_840


def test_the_first_gradient_reaches_the_channel_weights() -> None:
    weights = Reactivation(3, 4)
    weights(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).square().sum().backward()
    assert weights.channel_weight.grad is not None and weights.channel_weight.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    source, pairs = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 4).to(dtype)
    result = random_weights(3, 4).to(dtype)(source, pairs)
    assert result.dtype == dtype
    exact = random_weights(3, 4)(source.double(), pairs.double())
    assert (result.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_repr_names_the_sizes() -> None:
    assert "max_pairs=7, dim=3" in repr(Reactivation(7, 3))


@pytest.mark.parametrize(("pairs", "dim"), [(0, 4), (4, 0), (-1, 4)])
def test_errors(pairs: int, dim: int) -> None:
    with pytest.raises(ValueError, match=f"max_pairs and dim must be positive, got {pairs} and {dim}"):
        Reactivation(pairs, dim)

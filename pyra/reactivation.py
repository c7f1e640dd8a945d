"""Parallel yielding adaptive weights: the trained part of PYRA (arXiv 2403.09192, section 3.2).

For the ``r`` matched pairs of a layer, ``M_info = LayerNorm(M_s + M_t)`` yields one weight a channel and one a token,
and the source tokens are modulated before they merge:

    delta_D = W_r^T M_info   [B, 1, C]        delta_r = M_info W_D^T   [B, r, 1]
    M_s <- M_s + (2 sigmoid(delta_r) - 1) * (2 sigmoid(delta_D) * M_s)

``M_s`` and ``M_t`` are size-weighted sums, as in the published code. ``W_D`` starts at zero, which makes the step the
identity. Letters: ``B`` batch, ``C`` channels, ``r`` pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyra.kernels.merge import reactivate


class Reactivation(nn.Module):
    """The re-activation weights of one layer.

    Args:
        max_pairs: rows of ``pair_weight``, the largest number of tokens the layer removes. Rows are indexed by the
            rank of a pair's similarity: fewer pairs read the first rows, and pairs past the last row do not contribute
            to the channel weights.
        dim: channels ``C``.

    Attributes:
        pair_weight: ``W_r`` [max_pairs, 1], uniform in (-1, 1) at the start.
        channel_weight: ``W_D`` [1, dim], zero at the start.
        norm: LayerNorm over channels, eps 1e-5, trained affine.

    Raises:
        ValueError: if ``max_pairs`` or ``dim`` is not positive.
    """

    def __init__(
        self,
        max_pairs: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_pairs < 1 or dim < 1:
            raise ValueError(f"Reactivation: max_pairs and dim must be positive, got {max_pairs} and {dim}")
        self.pair_weight = nn.Parameter(torch.empty(max_pairs, 1, device=device, dtype=dtype))
        self.channel_weight = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published; the module is then the identity."""
        nn.init.uniform_(self.pair_weight, -1.0, 1.0)
        nn.init.zeros_(self.channel_weight)
        self.norm.reset_parameters()

    def forward(self, source: Tensor, pairs: Tensor) -> Tensor:
        """Modulate ``source`` [B, r, C] by ``pairs`` = ``M_s + M_t`` [B, r, C] (:func:`reactivate`)."""
        return reactivate(source, pairs, self)

    def extra_repr(self) -> str:
        """Return the sizes shown in ``print(model)``."""
        return f"max_pairs={self.pair_weight.shape[0]}, dim={self.channel_weight.shape[1]}"

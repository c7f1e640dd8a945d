"""What passes through the layers of a decoder that merges prompts: what is told before, and what is left behind.

Letters: ``B`` batch, ``N`` tokens now, ``N0`` tokens at the first layer, ``K`` keys, ``C`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyra.merging import spread


@dataclass(frozen=True)
class Tokens:
    """What the layers are told of the tokens of a forward.

    Attributes:
        present: [B, N] true on what is no padding.
        prompt: [B, N] true on prompts that are to merge; None where a prompt was read before.
        lengths: [B] tokens of the prompts.
        padded: whether there is padding.
        after: tokens that stand behind the longest-reaching prompt of the batch.
    """

    present: Tensor
    prompt: Tensor | None = None
    lengths: Tensor | None = None
    padded: bool = False
    after: int = 0


@dataclass(frozen=True)
class Seen:
    """What the attention of the layers up to the next merge is given.

    Attributes:
        mask: what transformers makes for the attention function.
        rotary: cosines and sines of the tokens that are left.
        size: [B, K] words of each key.
        bias: [B, 1, 1, K] their logarithm, float32; 0 for padding, which the mask leaves out. None where no layer
            adds it.
    """

    mask: Any
    rotary: Any
    size: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class PromptStream:
    """What passes between layers behind a merge.

    Attributes:
        tokens: [B, N, C].
        size: [B, N, 1] int32 words each token stands for, 0 for padding.
        places: [B, N] place of each token among the original ones; a merged token has that of its destination.
        prompt: [B, N] true on what is left of the prompts.
        gone: [B] tokens that each prompt has lost.
        padded: whether there is padding.
        source_map: [B, N0] row that holds each original token; None while that is its own.
        seen: None until a layer has made it.
    """

    tokens: Tensor
    size: Tensor
    places: Tensor | None = None
    prompt: Tensor | None = None
    gone: Tensor | None = None
    padded: bool = False
    source_map: Tensor | None = None
    seen: Seen | None = None

    def spread(self) -> Tensor:
        """Return [B, N0, C]: for each original token the one that holds it."""
        return self.tokens if self.source_map is None else spread(self.tokens, self.source_map)

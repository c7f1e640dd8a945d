"""What an export returns: the logits of a model, whatever its family wraps them in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyra.errors import ExportError


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, classes] of what a model returned: a tensor, or an output of transformers.

    Raises:
        ExportError: for a model that returns something else.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ExportError(f"an export returns logits [B, classes], this model {found}: give it a classification head")
    return logits


class LogitsOnly(nn.Module):
    """A model whose output is the tensor of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, classes] of pixel values [B, 3, H, W]."""
        return logits_of(self.model(pixel_values))

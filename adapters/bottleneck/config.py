"""Configuration of the bottleneck adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from pyra.errors import ConfigError, did_you_mean

PEFT_TYPE = "BOTTLENECK"
PLACEMENTS = ("after", "parallel")


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapter, after a block's MLP or beside it.

    Args:
        width: hidden channels; arXiv 2403.09192 takes 4 / 8 / 12 for ViT-S / B / L, AdaptFormer 64 for ViT-B.
        dropout: dropout on the hidden channels.
        placement: ``"after"``, on the MLP's output (arXiv 1902.00751, as used in arXiv 2403.09192, section 4), with
            QuickGELU; ``"parallel"``, on the MLP's input, its output added to that of the MLP (AdaptFormer, arXiv
            2205.13535, section 3.2), with ReLU.
        scale: factor on what a parallel adapter adds, 0.1 in AdaptFormer; ``"after"`` adds it unscaled.
        target_modules: modules whose output is adapted (names or a regular expression).
        exclude_modules: modules left out, as in every PEFT method.
        modules_to_save: further modules trained and saved whole.
        layers_to_transform: indices of the blocks to adapt; None adapts all.
        layers_pattern: name of the block list, used with ``layers_to_transform``.
    """

    width: int = field(default=8, metadata={"help": "hidden channels"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the hidden channels"})
    placement: str = field(default="after", metadata={"help": "after the adapted module, or parallel to it"})
    scale: float = field(default=0.1, metadata={"help": "factor on what a parallel adapter adds"})
    target_modules: list[str] | str | None = field(
        default_factory=lambda: ["mlp"], metadata={"help": "adapted modules"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules left out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the block list"})

    def __post_init__(self) -> None:
        """Set the PEFT type and check the numbers."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        problems = []
        if self.width < 1 or not 0 <= self.dropout < 1:
            problems.append(f"width must be positive and dropout in [0, 1), got {self.width} and {self.dropout}")
        if self.placement not in PLACEMENTS:
            hint = did_you_mean(str(self.placement), PLACEMENTS)
            problems.append(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}{hint}")
        if not math.isfinite(self.scale) or not self.scale:
            problems.append(f"scale must be a finite number other than 0, got {self.scale!r}")
        if problems:
            raise ConfigError("BottleneckConfig: " + "; ".join(problems))

"""Configuration of the bottleneck adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from pyra.errors import ConfigError

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Sequential bottleneck adapter after a block's MLP (arXiv 1902.00751, as used in arXiv 2403.09192, section 4).

    Args:
        width: hidden channels; the paper takes 4 / 8 / 12 for ViT-S / B / L.
        dropout: dropout on the hidden channels.
        target_modules: modules whose output is adapted (names or a regular expression).
        exclude_modules: modules left out, as in every PEFT method.
        modules_to_save: further modules trained and saved whole.
        layers_to_transform: indices of the blocks to adapt; None adapts all.
        layers_pattern: name of the block list, used with ``layers_to_transform``.
    """

    width: int = field(default=8, metadata={"help": "hidden channels"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the hidden channels"})
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
        if self.width < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"BottleneckConfig: width must be positive and dropout in [0, 1), got {self.width} and {self.dropout}"
            )

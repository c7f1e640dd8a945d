"""Configuration of visual prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from pyra.errors import ConfigError

PEFT_TYPE = "VISUAL_PROMPTS"


@dataclass
class VisualPromptsConfig(PeftConfig):
    """Trained tokens between the class token and the patches (VPT, arXiv 2203.12119, section 3.2).

    Prompts are prefix tokens: they never merge, outputs and hidden states have rows for them, and pooling over patches
    leaves them out in timm (heads of transformers that average all rows average them too). They are no weights:
    ``fold_adapter`` makes them an ordinary part of the backbone, which keeps its extra tokens and their cost.

    Args:
        num_prompts: tokens added; the paper picks 1, 5, 10, 50, 100 or 200 for each task on validation data.
        deep: give each layer prompts of its own, in the place of those that left the layer before (VPT-Deep); False
            adds prompts before the first layer alone (VPT-Shallow).
        dropout: dropout on the prompts.
        target_modules: the module that the patches and their class token come from; None finds it.
        exclude_modules: modules left out, as in every PEFT method.
        modules_to_save: further modules trained and saved whole.
    """

    num_prompts: int = field(default=10, metadata={"help": "tokens added"})
    deep: bool = field(default=True, metadata={"help": "prompts of its own for each layer"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the prompts"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "where the tokens come from"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules left out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})

    def __post_init__(self) -> None:
        """Set the PEFT type and check the numbers."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.num_prompts < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "VisualPromptsConfig: num_prompts must be positive and dropout in [0, 1), got "
                f"{self.num_prompts} and {self.dropout}"
            )

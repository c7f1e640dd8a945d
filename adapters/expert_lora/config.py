"""Configuration of LoRA on routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from pyra.errors import ConfigError, did_you_mean

PEFT_TYPE = "EXPERT_LORA"
PROJECTIONS = ("gate_up_proj", "down_proj")
# Of stock LoRA, and without a counterpart for the products of experts; the default of each asks for nothing.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "use_bdlora",
)


@dataclass
class ExpertLoraConfig(LoraConfig):
    """LoRA (arXiv 2106.09685) on the routed experts of a mixture, and where asked for on other modules beside them.

    An expert ``e`` with weights ``W_e`` [out, in] computes ``x W_e^T + s (x A_e^T) B_e^T``, ``A_e`` [r, in], ``B_e``
    [out, r] (zero at the start) and ``s = lora_alpha / r``, for the tokens that are sent to it alone. Training only the
    experts that a task uses is ESFT (arXiv 2407.01906); :func:`pyra.experts.choose_task_experts` names them.

    Modifications against ``peft.LoraConfig``, whose other options, ``rank_pattern`` among them, are about
    ``target_modules`` alone:

    Args:
        lora_alpha: 16.
        experts: indices of the experts that are adapted: a list for all layers, or a list for each layer, by the name
            of its mixture (``"model.layers.1.mlp"``) or the number in it; layers without one are left out. None adapts
            all experts.
        layers: numbers of the decoder layers whose experts are adapted; None takes all that have some.
        projections: ``"gate_up_proj"`` and ``"down_proj"``, or one of them.
        target_modules: further modules to adapt with ordinary LoRA, such as ``["q_b_proj", "o_proj"]``; None adapts
            the experts alone. ``target_parameters=["mlp.gate.weight"]`` adapts the router.
        lora_dropout: also on what enters the factors of an expert.

    Raises:
        ConfigError: for values that are none, and for options of stock LoRA that experts have no counterpart of.
    """

    lora_alpha: int = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    experts: dict[str, list[int]] | list[int] | None = field(default=None, metadata={"help": "adapted experts"})
    layers: list[int] | None = field(default=None, metadata={"help": "layers whose experts are adapted"})
    projections: list[str] = field(
        default_factory=lambda: list(PROJECTIONS), metadata={"help": "adapted weights of an expert"}
    )

    def __post_init__(self) -> None:
        """Set the PEFT type and check the values."""
        problems = []
        if type(self.r) is not int or self.r < 1:
            problems.append(f"r must be a whole number of at least 1, got {self.r!r}")
        if isinstance(self.experts, Mapping):
            self.experts = {str(layer): list(chosen) for layer, chosen in self.experts.items()}  # as JSON has them
        lists = self.experts.values() if isinstance(self.experts, dict) else [self.experts]
        if self.experts == {} or not all(chosen is None or _indices(chosen) for chosen in lists):
            problems.append(f"experts must be lists of different indices, got {self.experts!r}")
        if self.layers is not None and not _indices(self.layers):
            problems.append(f"layers must be a list of different numbers, got {self.layers!r}")
        if not self.projections or isinstance(self.projections, str) or set(self.projections) - set(PROJECTIONS):
            hint = did_you_mean(str(next(iter(self.projections), "")), PROJECTIONS)
            problems.append(f"projections must be some of {', '.join(PROJECTIONS)}, got {self.projections!r}{hint}")
        problems += [f"{name} has no counterpart for experts" for name in _REFUSED if getattr(self, name, None)]
        if self.init_lora_weights is not True:
            problems.append(f"init_lora_weights must be True, got {self.init_lora_weights!r}")
        if problems:
            raise ConfigError("ExpertLoraConfig: " + "; ".join(problems))
        super().__post_init__()
        self.peft_type = PEFT_TYPE


def _indices(values: Any) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(type(value) is int and value >= 0 for value in values)
        and len(set(values)) == len(values)
    )

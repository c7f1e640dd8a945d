"""LoRA on routed experts, factored, as a PEFT method: ``adapt(model, peft=ExpertLoraConfig(r=16))``.

peft's own registration accepts only names of its built-in enumeration, so the three look-up tables are filled here.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pyra.adapters.expert_lora.config import PEFT_TYPE, ExpertLoraConfig
from pyra.adapters.expert_lora.layer import ExpertFactors, ExpertLoraLayer
from pyra.adapters.expert_lora.model import ExpertLoraModel

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = ExpertLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = ExpertLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = ExpertLoraModel.prefix

__all__ = ["ExpertFactors", "ExpertLoraConfig", "ExpertLoraLayer", "ExpertLoraModel"]

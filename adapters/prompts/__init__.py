"""Visual prompts as a PEFT method (VPT, arXiv 2203.12119): ``VisualPromptsConfig(num_prompts=10, deep=True)``.

peft's own registration accepts only names of its built-in enumeration, so the three look-up tables are filled here.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pyra.adapters.prompts.config import PEFT_TYPE, VisualPromptsConfig
from pyra.adapters.prompts.layer import PromptedTokens, PromptsLayer, VisualPrompts
from pyra.adapters.prompts.model import PromptsModel

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = VisualPromptsConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PromptsModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PromptsModel.prefix

__all__ = ["PromptedTokens", "PromptsLayer", "PromptsModel", "VisualPrompts", "VisualPromptsConfig"]

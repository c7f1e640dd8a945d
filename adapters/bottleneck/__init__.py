"""The bottleneck adapter as a PEFT method: ``peft.get_peft_model(model, BottleneckConfig(width=8))``.

peft's own registration accepts only names of its built-in enumeration, so the three look-up tables are filled here.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pyra.adapters.bottleneck.config import PEFT_TYPE, BottleneckConfig
from pyra.adapters.bottleneck.layer import Bottleneck, BottleneckLayer
from pyra.adapters.bottleneck.model import BottleneckModel

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BottleneckModel.prefix

__all__ = ["Bottleneck", "BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

"""JoyAI-LLM Flash, a mixture-of-experts decoder: its configuration and model, known to transformers' Auto classes.

The network is DeepSeek-V3's (multi-head latent attention, routed and shared experts), which transformers has; what
differs is kept here. The layer for multi-token prediction (MTP) is dense in this model, not a mixture.

Sources: the published configuration of ``jdopensource/JoyAI-LLM-Flash``; technical report, arXiv 2604.03044.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3RMSNorm,
)

from pyra.backbones.joyai_drafting import DraftsWithMtp
from pyra.errors import ConfigError

MODEL_TYPE = "joyai_llm_flash"
MTP_ATTRIBUTE = "mtp"
"""Child of a model that is its MTP layer, where one is attached."""
MODEL_TYPES = (MODEL_TYPE, "deepseek_v3")
"""What ``config.json`` of a published copy calls itself; earlier copies say the second."""

PUBLISHED: Mapping[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "first_k_dense_replace": 1,
    "intermediate_size": 7168,
    "moe_intermediate_size": 768,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 3.2e7,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "architectures": ["DeepseekV3ForCausalLM"],
}
"""The published configuration."""


class JoyAIConfig(DeepseekV3Config):
    """Configuration of JoyAI-LLM Flash; the fields are those of DeepSeek-V3."""

    model_type = MODEL_TYPE

    def get_mtp_config(self) -> JoyAIConfig:
        """Return the configuration of the MTP layers, whose MLP is dense."""
        values: JoyAIConfig = super().get_mtp_config()
        values.first_k_dense_replace = values.num_hidden_layers
        return values


class _WithFastExperts:
    """transformers looks for its experts' decorator in the file of a class, and the experts are in another one."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class JoyAIModel(_WithFastExperts, DeepseekV3Model):
    """The decoder without its head."""

    config_class = JoyAIConfig

    def __init__(self, config: JoyAIConfig) -> None:
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = _mtp_patterns(config)


class JoyAIForCausalLM(_WithFastExperts, DraftsWithMtp, DeepseekV3ForCausalLM):
    """The language model; ``generate(use_mtp=True)`` drafts with the MTP layer that is attached, or in its folder.

    Published checkpoints hold a matrix an expert: transformers stacks them on loading and writes them apart again.

    Attributes:
        mtp: the MTP layer, of :func:`~pyra.backbones.joyai_mtp.attach_mtp`; None where there is none.
    """

    config_class = JoyAIConfig
    mtp: nn.Module | None

    def __init__(self, config: JoyAIConfig) -> None:
        super().__init__(config)
        self.register_module(MTP_ATTRIBUTE, None)
        self._keys_to_ignore_on_load_unexpected = _mtp_patterns(config)


def _mtp_patterns(config: JoyAIConfig) -> set[str]:
    """Return patterns of the weights of MTP layers, which are numbered on from the last layer."""
    first = config.num_hidden_layers
    return {rf"(^|model\.)layers\.{first + index}\." for index in range(config.num_nextn_predict_layers or 0)}


def config(**changes: Any) -> JoyAIConfig:
    """Return the published configuration, with other values where ``changes`` names some.

    Raises:
        ConfigError: for a name that the configuration does not have, or values that do not fit each other.

    >>> config(num_hidden_layers=2).n_routed_experts
    256
    """
    known = {*PUBLISHED, *vars(DeepseekV3Config()), "pad_token_id", "attn_implementation", "experts_implementation"}
    if unknown := sorted(changes.keys() - known):
        raise ConfigError(f"the configuration has no {', '.join(unknown)}")
    values = copy.deepcopy({**PUBLISHED, **changes})
    experts, groups = values["n_routed_experts"], values["n_group"]
    problems = []
    if not 1 <= values["num_experts_per_tok"] <= experts:
        problems.append(f"num_experts_per_tok is {values['num_experts_per_tok']}, of {experts} experts")
    if experts % groups or experts // groups < 2:
        problems.append(f"{experts} experts do not make {groups} equal groups of two or more")
    if not 0 <= values["first_k_dense_replace"] <= values["num_hidden_layers"]:
        problems.append(
            f"first_k_dense_replace is {values['first_k_dense_replace']}, of {values['num_hidden_layers']} layers"
        )
    if problems:
        raise ConfigError("; ".join(problems))
    return JoyAIConfig(**values)


def tiny_config(**changes: Any) -> JoyAIConfig:
    """Return a configuration of the same shape family whose model fits a test: 4 layers, 8 experts, 0.3 M weights.

    ``changes`` as in :func:`config`.
    """
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 1e4,
        "dtype": "float32",
    }
    return config(**{**small, **changes})


def parameter_count(configuration: JoyAIConfig | None = None) -> dict[str, int]:
    """Count the weights of a model, which is made on the meta device and takes no memory.

    Args:
        configuration: of the model; the published one if None.

    Returns:
        ``without_mtp``: the parameters of the model. ``with_mtp``: all that a published checkpoint holds, which is the
        routers' correction biases besides (buffers, in PyTorch's terms), the MTP layers, and one matrix of the size of
        the embedding that the MTP shard carries along. Without MTP layers both are the parameters.
    """
    configuration = config() if configuration is None else configuration
    with torch.device("meta"):
        model = JoyAIForCausalLM(configuration)
        layers = mtp_layers(configuration)
    own = sum(parameter.numel() for parameter in model.parameters())
    if not layers:
        return {"without_mtp": own, "with_mtp": own}
    modules: list[nn.Module] = [model, *layers]
    stored = sum(value.numel() for module in modules for value in module.state_dict(keep_vars=True).values())
    return {"without_mtp": own, "with_mtp": stored + model.get_input_embeddings().weight.numel()}


def mtp_layers(configuration: JoyAIConfig) -> list[nn.Module]:
    """Make the MTP layers of a configuration, with random weights."""
    values = configuration.get_mtp_config()
    return [
        MtpLayer(values, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, index)
        for index in range(configuration.num_nextn_predict_layers or 0)
    ]


def _register() -> None:
    AutoConfig.register(MODEL_TYPE, JoyAIConfig, exist_ok=True)
    AutoModel.register(JoyAIConfig, JoyAIModel, exist_ok=True)
    AutoModelForCausalLM.register(JoyAIConfig, JoyAIForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


_register()

"""The keys of a GGUF file: what llama.cpp is told about a model, and the configuration that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from pyra.errors import ExportError
from pyra.export.gguf_layout import ARCHITECTURES

_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def refuse_other_sums(family: str, config: Any) -> None:
    """Raise :class:`ExportError` for what the architecture in llama.cpp computes otherwise, or has no key for here."""
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise ExportError(f"rope_type is {kind!r}: GGUF is written for plain rotation alone; write --format engine")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ExportError("the model attends in a sliding window, which GGUF is not written for; write --format engine")
    if config.hidden_act != "silu":
        raise ExportError(f"hidden_act is {config.hidden_act!r}: {ARCHITECTURES[family]} of llama.cpp has silu")


def add_keys(writer: gguf.GGUFWriter, family: str, config: Any, weights: str, name: str) -> None:
    """Say what the model is; the writer knows its architecture."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if ARCHITECTURES[family] == "deepseek2":
        _add_deepseek(writer, config)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _add_deepseek(writer: gguf.GGUFWriter, config: Any) -> None:
    # Latents are read as one head of keys that all heads share; the lengths of heads as they are stand beside.
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # llama.cpp reads it of all depths but those that it knows
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def deepseek_values(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``DeepseekV3Config`` that the keys of a ``deepseek2`` file stand for.

    Raises:
        ExportError: where a key is missing.
    """
    fields = {
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "vocab_size": "vocab_size",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "v_head_dim": "attention.value_length_mla",
        "first_k_dense_replace": "leading_dense_block_count",
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "n_shared_experts": "expert_shared_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
    }
    try:
        values = {field: keys[f"deepseek2.{key}"] for field, key in fields.items()}
        values["qk_nope_head_dim"] = keys["deepseek2.attention.key_length_mla"] - values["qk_rope_head_dim"]
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": keys["deepseek2.rope.freq_base"]}
        gating = keys["deepseek2.expert_gating_func"]
    except KeyError as error:
        raise ExportError(f"the GGUF file leaves {error.args[0]} out") from None
    if gating != gguf.ExpertGatingFuncType.SIGMOID:
        raise ExportError(f"the GGUF file's experts are gated by function {gating}, not by a sigmoid")
    values["q_lora_rank"] = keys.get("deepseek2.attention.q_lora_rank") or None
    return values | {"num_nextn_predict_layers": 0, "tie_word_embeddings": False}

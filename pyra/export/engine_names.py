"""What serving engines read: the names of tensors, their shapes, and the keys of ``config.json``. A table, in code.

Each engine is listed with the source that its names were read in, and the revision of it; of the engines, llama.cpp
alone was run on what is written (``tests/export/test_llama_cpp.py``). A tensor in a checkpoint is put into a parameter
of the engine, alone or stacked with others; one that an engine has no parameter for stops it from loading, and one that
it misses leaves that parameter unset, in some engines without a word. So :mod:`pyra.export.engine_check` holds both.

Names are those of the checkpoint, ``{l}`` is a layer and ``{e}`` an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEEPSEEK = "deepseek_v3"
LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Dense decoders of the Llama type, by ``model_type``."""

_ATTENTION, _MLP, _EXPERT = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp.", "model.layers.{l}.mlp.experts.{e}."
_SIDES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Engine:
    """One engine's reader of a family.

    Attributes:
        name: of the engine.
        revision: of the source, as its repository or its package names it.
        file: of the source.
        parameters: what each tensor is put into; several names with one value are stacked.
        keys: of ``config.json`` that it reads without a default.
    """

    name: str
    revision: str
    file: str
    parameters: Mapping[str, str]
    keys: tuple[str, ...]


_WHOLE = {"model.embed_tokens.weight": "embed_tokens", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}
_NORMS = {
    f"model.layers.{{l}}.{name}.weight": f"layers.{name}" for name in ("input_layernorm", "post_attention_layernorm")
}


def _stacked_mlp(prefix: str, name: str) -> dict[str, str]:
    into = ("gate_up_proj", "gate_up_proj", "down_proj")
    return {f"{prefix}{side}.weight": f"{name}.{into[index]}" for index, side in enumerate(_SIDES)}


_LATENT = ("q_b_proj", "kv_b_proj", "o_proj", "q_a_layernorm", "kv_a_layernorm", "q_proj")

# vLLM stacks gate and up, fuses the two projections down into latents, and puts experts into w13 and w2.
_VLLM = {
    **_WHOLE,
    **_NORMS,
    **{f"{_ATTENTION}{name}.weight": f"self_attn.{name}" for name in _LATENT},
    f"{_ATTENTION}q_a_proj.weight": "self_attn.fused_qkv_a_proj",
    f"{_ATTENTION}kv_a_proj_with_mqa.weight": "self_attn.fused_qkv_a_proj",
    **_stacked_mlp(_MLP, "mlp"),
    **_stacked_mlp(f"{_MLP}shared_experts.", "mlp.shared_experts"),
    f"{_EXPERT}gate_proj.weight": "mlp.experts.w13_weight",
    f"{_EXPERT}up_proj.weight": "mlp.experts.w13_weight",
    f"{_EXPERT}down_proj.weight": "mlp.experts.w2_weight",
    f"{_MLP}gate.weight": "mlp.gate.weight",
    f"{_MLP}gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
}
_SGLANG = {
    **_VLLM,
    f"{_ATTENTION}q_a_proj.weight": "self_attn.fused_qkv_a_proj_with_mqa",
    f"{_ATTENTION}kv_a_proj_with_mqa.weight": "self_attn.fused_qkv_a_proj_with_mqa",
}
# llama.cpp splits kv_b_proj and stacks the experts of a layer.
_LLAMA_CPP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{l}.input_layernorm.weight": "blk.{l}.attn_norm.weight",
    "model.layers.{l}.post_attention_layernorm.weight": "blk.{l}.ffn_norm.weight",
    f"{_ATTENTION}q_proj.weight": "blk.{l}.attn_q.weight",
    f"{_ATTENTION}q_a_proj.weight": "blk.{l}.attn_q_a.weight",
    f"{_ATTENTION}q_b_proj.weight": "blk.{l}.attn_q_b.weight",
    f"{_ATTENTION}q_a_layernorm.weight": "blk.{l}.attn_q_a_norm.weight",
    f"{_ATTENTION}kv_a_proj_with_mqa.weight": "blk.{l}.attn_kv_a_mqa.weight",
    f"{_ATTENTION}kv_a_layernorm.weight": "blk.{l}.attn_kv_a_norm.weight",
    f"{_ATTENTION}kv_b_proj.weight": "blk.{l}.attn_k_b.weight, blk.{l}.attn_v_b.weight",
    f"{_ATTENTION}o_proj.weight": "blk.{l}.attn_output.weight",
    **{f"{_MLP}{side}.weight": f"blk.{{l}}.ffn_{side[:-5]}.weight" for side in _SIDES},
    **{f"{_MLP}shared_experts.{side}.weight": f"blk.{{l}}.ffn_{side[:-5]}_shexp.weight" for side in _SIDES},
    **{f"{_EXPERT}{side}.weight": f"blk.{{l}}.ffn_{side[:-5]}_exps.weight" for side in _SIDES},
    f"{_MLP}gate.weight": "blk.{l}.ffn_gate_inp.weight",
    f"{_MLP}gate.e_score_correction_bias": "blk.{l}.exp_probs_b.bias",
}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")  # fmt: skip
_OF_DEEPSEEK = (
    *_SIZES, "architectures", "model_type", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group",
    "rope_theta", "num_nextn_predict_layers",
)  # fmt: skip

_DEEPSEEK_ENGINES = (
    Engine(
        "vLLM", "002d6073", "vllm/model_executor/models/deepseek_v2.py", _VLLM,
        (*_OF_DEEPSEEK, "topk_method", "torch_dtype", "tie_word_embeddings"),
    ),
    Engine(
        "SGLang", "00114aef", "python/sglang/srt/models/deepseek_v2.py", _SGLANG,
        (*_OF_DEEPSEEK, "topk_method", "moe_layer_freq", "torch_dtype"),
    ),
    Engine("llama.cpp", "gguf 0.19", "convert_hf_to_gguf.py, DeepseekV2Model", _LLAMA_CPP, _OF_DEEPSEEK),
)  # fmt: skip

_QKV = ("q_proj", "k_proj", "v_proj")
_STACKED_LLAMA = {
    **_WHOLE,
    **_NORMS,
    **{f"{_ATTENTION}{name}.{kind}": "self_attn.qkv_proj" for name in _QKV for kind in ("weight", "bias")},
    **{f"{_ATTENTION}o_proj.{kind}": "self_attn.o_proj" for kind in ("weight", "bias")},
    **{f"{_ATTENTION}{name}.weight": f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **_stacked_mlp(_MLP, "mlp"),
    **{name.replace(".weight", ".bias"): value for name, value in _stacked_mlp(_MLP, "mlp").items()},
}
_KINDS = ("weight", "bias")
_GGUF_LLAMA = {
    **{name: _LLAMA_CPP[name] for name in (*_WHOLE, *_NORMS)},
    **{f"{_ATTENTION}{name}_proj.{kind}": f"blk.{{l}}.attn_{name}.{kind}" for name in "qkv" for kind in _KINDS},
    **{f"{_ATTENTION}o_proj.{kind}": f"blk.{{l}}.attn_output.{kind}" for kind in ("weight", "bias")},
    **{f"{_ATTENTION}{name}_norm.weight": f"blk.{{l}}.attn_{name}_norm.weight" for name in "qk"},
    **{f"{_MLP}{side}.{kind}": f"blk.{{l}}.ffn_{side[:-5]}.{kind}" for side in _SIDES for kind in ("weight", "bias")},
}  # fmt: skip
_LLAMA_REVISIONS = {  # of vLLM's and SGLang's files
    "llama": ("0035bdf2", "00239548"),
    "qwen2": ("013a2792", "0005b7e1"),
    "qwen3": ("002456df", "01b5f572"),
}
_OF_LLAMA = (*_SIZES, "architectures", "model_type", "rope_theta", "tie_word_embeddings")


def engines_for(model_type: str) -> tuple[Engine, ...]:
    """Return the engines' readers of a family: of ``deepseek_v3``, or of the Llama type."""
    if model_type == DEEPSEEK:
        return _DEEPSEEK_ENGINES
    own = "llama" if model_type == "mistral" else model_type
    vllm, sglang = _LLAMA_REVISIONS[own]
    keys = (*_OF_LLAMA, "torch_dtype")
    return (
        Engine("vLLM", vllm, f"vllm/model_executor/models/{own}.py", _STACKED_LLAMA, keys),
        Engine("SGLang", sglang, f"python/sglang/srt/models/{own}.py", _STACKED_LLAMA, keys),
        Engine("llama.cpp", "gguf 0.19", "convert_hf_to_gguf.py", _GGUF_LLAMA, _OF_LLAMA),
    )


def needed_shapes(values: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return every tensor that the model of a ``config.json`` needs, with its shape; MTP layers are no part of it.

    >>> small = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6,
    ...          "num_hidden_layers": 0, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> needed_shapes(small)["lm_head.weight"]
    [8, 4]
    """
    width, words = values["hidden_size"], values["vocab_size"]
    found = {"model.embed_tokens.weight": [words, width], "model.norm.weight": [width]}
    if not values.get("tie_word_embeddings"):
        found["lm_head.weight"] = [words, width]
    for layer in range(values["num_hidden_layers"]):
        deepseek = values["model_type"] == DEEPSEEK
        found |= _deepseek_layer(values, layer) if deepseek else _llama_layer(values, layer)
    return found


def _norms(layer: int, width: int) -> dict[str, list[int]]:
    return {name.format(l=layer): [width] for name in _NORMS}


def _mlp(prefix: str, width: int, inner: int) -> dict[str, list[int]]:
    sides = ([inner, width], [inner, width], [width, inner])
    return {f"{prefix}{name}.weight": side for name, side in zip(_SIDES, sides, strict=True)}


def latent_attention(values: Mapping[str, Any], layer: int) -> dict[str, list[int]]:
    """Return the tensors of one layer's latent attention, and its two norms."""
    width, heads, rank = values["hidden_size"], values["num_attention_heads"], values["q_lora_rank"]
    latent, rotated = values["kv_lora_rank"], values["qk_rope_head_dim"]
    queries = heads * (values["qk_nope_head_dim"] + rotated)
    sizes = {
        "kv_a_proj_with_mqa": [latent + rotated, width],
        "kv_a_layernorm": [latent],
        "kv_b_proj": [heads * (values["qk_nope_head_dim"] + values["v_head_dim"]), latent],
        "o_proj": [width, heads * values["v_head_dim"]],
    }
    if rank is None:
        sizes["q_proj"] = [queries, width]
    else:
        sizes |= {"q_a_proj": [rank, width], "q_a_layernorm": [rank], "q_b_proj": [queries, rank]}
    prefix = _ATTENTION.format(l=layer)
    return _norms(layer, width) | {f"{prefix}{name}.weight": size for name, size in sizes.items()}


def dense_mlp(values: Mapping[str, Any], layer: int) -> dict[str, list[int]]:
    """Return the tensors of one layer's dense MLP."""
    return _mlp(_MLP.format(l=layer), values["hidden_size"], values["intermediate_size"])


def mixture(values: Mapping[str, Any], layer: int) -> dict[str, list[int]]:
    """Return the tensors of one layer's mixture: its router, its experts one by one, and those that are shared."""
    width, inner, experts = values["hidden_size"], values["moe_intermediate_size"], values["n_routed_experts"]
    prefix = _MLP.format(l=layer)
    found = {f"{prefix}gate.weight": [experts, width], f"{prefix}gate.e_score_correction_bias": [experts]}
    found |= _mlp(f"{prefix}shared_experts.", width, inner * values["n_shared_experts"])
    for expert in range(experts):
        found |= _mlp(_EXPERT.format(l=layer, e=expert), width, inner)
    return found


def _deepseek_layer(values: Mapping[str, Any], layer: int) -> dict[str, list[int]]:
    dense = layer < values["first_k_dense_replace"]
    return latent_attention(values, layer) | (dense_mlp(values, layer) if dense else mixture(values, layer))


def _llama_layer(values: Mapping[str, Any], layer: int) -> dict[str, list[int]]:
    kind, width, heads = values["model_type"], values["hidden_size"], values["num_attention_heads"]
    head = values.get("head_dim") or width // heads
    keys = head * values["num_key_value_heads"]
    sizes = {"q_proj": [heads * head, width], "k_proj": [keys, width], "v_proj": [keys, width],
             "o_proj": [width, heads * head]}  # fmt: skip
    prefix = _ATTENTION.format(l=layer)
    found = _norms(layer, width) | {f"{prefix}{name}.weight": size for name, size in sizes.items()}
    if kind == "qwen3":
        found |= {f"{prefix}{name}.weight": [head] for name in ("q_norm", "k_norm")}
    biased = [] if not (kind == "qwen2" or values.get("attention_bias")) else [*_QKV]
    biased += ["o_proj"] if values.get("attention_bias") and kind != "qwen2" else []
    found |= {f"{prefix}{name}.bias": sizes[name][:1] for name in biased}
    found |= dense_mlp(values, layer)
    if values.get("mlp_bias"):
        inner = values["intermediate_size"]
        each = zip(_SIDES, ([inner], [inner], [width]), strict=True)
        found |= {f"{_MLP.format(l=layer)}{name}.bias": size for name, size in each}
    return found

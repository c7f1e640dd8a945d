"""GGUF files: read back by transformers where it knows the architecture, and by our own reader where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CHAT, SIZES, dense, mixture, opened, subject
from tiny_language import tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

gguf = pytest.importorskip("gguf", reason="the extra `engines` is not installed")

from pyra.backbones import joyai  # noqa: E402
from pyra.errors import ExportError  # noqa: E402
from pyra.export import LanguageModel, export_language_model  # noqa: E402
from pyra.export.engine_record import RECORD  # noqa: E402
from pyra.export.gguf_file import check_gguf, numbers, open_gguf, read_deepseek, read_keys  # noqa: E402
from pyra.export.gguf_layout import interleaved, joined_latent, laid_out, split_latent  # noqa: E402
from pyra.export.gguf_words import split_name  # noqa: E402
from pyra.export.language_formats import GGUF_FILE  # noqa: E402

IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def tensors(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in open_gguf(folder / GGUF_FILE).tensors}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    """A JoyAI model in float32; nobody writes to this folder."""
    folder = tmp_path_factory.mktemp("gguf")
    model = mixture(folder / "source", n_group=2, topk_group=1, qk_nope_head_dim=32)
    export_language_model(model, folder / "out", "gguf-f32")
    return folder / "out", model


def test_a_mixture_comes_back_by_our_own_reader(written: tuple[Path, LanguageModel]) -> None:
    folder, model = written
    again = read_deepseek(folder / GGUF_FILE)
    assert type(again).__module__.startswith("transformers.") and logits(model.model).std() > 0.1
    assert torch.allclose(logits(again), logits(model.model), atol=1e-6, rtol=1e-6)  # eps is a float32 in the file
    own = {**model.model.state_dict()}
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in again.state_dict().items())


def test_a_mixture_has_llama_cpp_s_keys_and_layouts(written: tuple[Path, LanguageModel]) -> None:
    folder, model = written
    found, keys, config = tensors(folder), read_keys(open_gguf(folder / GGUF_FILE)), model.model.config
    expected = {
        "general.architecture": "deepseek2", "deepseek2.block_count": 4, "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 40, "deepseek2.attention.value_length": 32,
        "deepseek2.attention.key_length_mla": 40, "deepseek2.attention.value_length_mla": 16,
        "deepseek2.rope.dimension_count": 8, "deepseek2.leading_dense_block_count": 1, "deepseek2.expert_count": 8,
        "deepseek2.expert_used_count": 2, "deepseek2.expert_group_count": 2, "deepseek2.expert_group_used_count": 1,
        "deepseek2.expert_weights_scale": 2.5, "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_gating_func": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT,
    }  # fmt: skip
    assert {name: keys.get(name) for name in expected} == expected
    heads, experts = config.num_attention_heads, config.n_routed_experts
    assert numbers(found["blk.1.attn_k_b.weight"]).shape == (heads, config.kv_lora_rank, config.qk_nope_head_dim)
    assert numbers(found["blk.1.attn_v_b.weight"]).shape == (heads, config.v_head_dim, config.kv_lora_rank)
    assert numbers(found["blk.2.ffn_gate_exps.weight"]).shape == (experts, 32, 64)
    layer = model.model.model.layers[2].mlp  # type: ignore[union-attr, index]
    assert torch.equal(numbers(found["blk.2.exp_probs_b.bias"]), layer.gate.e_score_correction_bias)
    assert torch.equal(numbers(found["blk.2.ffn_up_exps.weight"])[3], layer.experts.gate_up_proj[3, 32:])
    assert not any(name.startswith("blk.4.") for name in found)


@pytest.mark.parametrize(
    ("name", "kind"), [("gguf-f16", "F16"), ("gguf-bf16", "BF16"), ("gguf-q8_0", "Q8_0"), ("gguf", "BF16")]
)
def test_matrices_are_rounded_and_norms_and_routers_are_not(name: str, kind: str, tmp_path: Path) -> None:
    model = mixture(tmp_path / "source", qk_nope_head_dim=16)
    model = LanguageModel(model.model, model.tokenizer, model.rows, "a", model.files, dtype="bfloat16")
    record = export_language_model(model, tmp_path / "out", name)
    kinds = {key: tensor.tensor_type.name for key, tensor in tensors(tmp_path / "out").items()}
    floats = {key for key, found in kinds.items() if found == "F32"}
    assert floats == {laid.name for laid in laid_out(model.model) if laid.value.ndim == 1 or "gate_inp" in laid.name}
    odd = {key for key, found in kinds.items() if found not in ("F32", kind)}
    assert odd == ({f"blk.{layer}.attn_k_b.weight" for layer in range(4)} if kind == "Q8_0" else set())  # rows of 16
    assert record.reloaded is not None and 0 < record.reloaded["relative_difference"] < record.reloaded["tolerance"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "biased"])
def test_dense_decoders_come_back_by_transformers(kind: str, tmp_path: Path) -> None:
    model = opened(dense(kind), tmp_path / "source")
    record = export_language_model(model, tmp_path / "out", "gguf-f32")
    assert record.reloaded is not None and record.reloaded["with"].startswith("transformers ")
    assert record.reloaded["relative_difference"] < 1e-6 and record.reloaded["weight_difference"] == 0
    if kind in ("llama", "mistral", "qwen2"):  # what a user does
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=GGUF_FILE, dtype=torch.float32).eval()
        assert torch.allclose(logits(plain), logits(model.model), atol=1e-5, rtol=1e-5)
        assert logits(plain).std() > 0.1


def _turned(x: Tensor, theta: float) -> Tensor:
    """Rotate neighbouring channels of [T, ..., R] together, by position, as llama.cpp does for this architecture."""
    width = x.shape[-1]
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos(), angles.sin()
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def test_attention_on_latents_by_the_file_s_tensors_is_the_model_s(written: tuple[Path, LanguageModel]) -> None:
    """llama.cpp asks latents, one head of keys for all: queries go through k_b, and what they read through v_b."""
    folder, model = written
    found = {
        name.removeprefix("blk.2.attn_"): numbers(t).double() for name, t in tensors(folder).items() if "blk.2." in name
    }
    core: Any = model.model.model
    config, heads, length = core.config, 4, 10
    x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(2))
    turning = core.rotary_emb(x, torch.arange(length)[None])
    causal = torch.full((length, length), -torch.inf).triu(1)
    expected, _ = core.layers[2].self_attn(x, position_embeddings=turning, attention_mask=causal[None, None])
    own = x[0].double()
    query = _norm(own @ found["q_a.weight"].T, found["q_a_norm.weight"]) @ found["q_b.weight"].T
    query, turned = query.view(length, heads, -1).split([config.qk_nope_head_dim, 8], -1)
    latent, shared = (own @ found["kv_a_mqa.weight"].T).split([config.kv_lora_rank, 8], -1)
    latent = _norm(latent, found["kv_a_norm.weight"])
    query = torch.cat([torch.einsum("thn,hln->thl", query, found["k_b.weight"]), _turned(turned, 1e4)], -1)
    key = torch.cat([latent, _turned(shared, 1e4)], -1)
    scores = torch.einsum("thd,sd->hts", query, key) / (config.qk_nope_head_dim + 8) ** 0.5 + causal
    read = torch.einsum("hts,sl->thl", scores.softmax(-1), latent)
    result = torch.einsum("thl,hvl->thv", read, found["v_b.weight"]).flatten(1) @ found["output.weight"].T
    assert result.std() > 0.1 and torch.allclose(result.float(), expected[0], atol=1e-4, rtol=1e-4)


def test_layouts_are_undone_exactly() -> None:
    config = joyai.tiny_config()
    weight = torch.randn(4 * (16 + 16), 32, generator=torch.Generator().manual_seed(0))
    keys, values = split_latent(weight, config)
    assert keys.shape == (4, 32, 16) and values.shape == (4, 16, 32)
    assert torch.equal(joined_latent(keys, values), weight)
    assert torch.equal(keys[2, :, 5], weight[2 * 32 + 5]) and torch.equal(values[2, 5], weight[2 * 32 + 16 + 5])
    rows = torch.arange(16)
    assert interleaved(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_words_are_the_tokenizer_s(written: tuple[Path, LanguageModel]) -> None:
    fields = open_gguf(written[0] / GGUF_FILE).fields
    words = written[1].tokenizer
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == written[1].model.config.vocab_size  # type: ignore[union-attr]
    assert tokens[: len(words)] == words.convert_ids_to_tokens(range(len(words)))
    assert all(token.startswith("[PAD") for token in tokens[len(words) :])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:3] == [gguf.TokenType.CONTROL] * 3 and set(kinds[3 : len(words)]) == {gguf.TokenType.NORMAL}
    assert len(fields["tokenizer.ggml.merges"].contents()) > 10


def test_a_tokenizer_of_another_kind_stays_out_and_the_record_says_so(tmp_path: Path) -> None:
    model = subject(dense("llama"))
    words = tokenizer("words")
    model = LanguageModel(model.model, words, [words("a fine film")["input_ids"]], "a")
    record = export_language_model(model, tmp_path, "gguf-f32")
    assert read_keys(open_gguf(tmp_path / GGUF_FILE))["tokenizer.ggml.model"] == "no_vocab"
    assert any("no byte-level BPE" in note for note in record.notes)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}},
          {"type": "Split", "pattern": {"Regex": "[一-龥぀-ゟ]+"}},
          {"type": "ByteLevel", "use_regex": False}], "deepseek-v3"),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{N}{1,3}"}},
          {"type": "ByteLevel", "use_regex": False}], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{N}| ?"}},
          {"type": "ByteLevel", "use_regex": False}], "qwen2"),
        ([{"type": "Split", "pattern": {"Regex": "x+"}}, {"type": "ByteLevel", "use_regex": False}], "default"),
    ],
)  # fmt: skip
def test_how_texts_are_split_has_llama_cpp_s_name(steps: list[dict[str, Any]], name: str) -> None:
    assert split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}) == name


def _rewrite(path: Path, change: Any) -> None:
    """Write a file again with other tensors."""
    reader = open_gguf(path)
    found = {tensor.name: numbers(tensor).numpy() for tensor in reader.tensors}
    keys = read_keys(reader)
    change(found)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), keys["general.architecture"])
    for name, value in found.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("blk.1.ffn_up_exps.weight"), r"blk\.1\.ffn_up_exps\.weight is missing"),
        (
            lambda found: found.update({"blk.1.extra.weight": found["output_norm.weight"]}),
            r"extra\.weight is not known",
        ),
        (
            lambda found: found.update({"output.weight": found["output.weight"].T}),
            r"output\.weight is \[64, 400\], not",
        ),
        (lambda found: found.update({"output.weight": found["output.weight"][::-1]}), "does not hold the model's"),
        (lambda found: found.update({"blk.1.attn_k_b.weight": found["blk.2.attn_k_b.weight"]}), "attn_k_b.weight does"),
    ],
)
def test_damage_is_found(change: Any, said: str, written: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    path = tmp_path / GGUF_FILE
    path.write_bytes((written[0] / GGUF_FILE).read_bytes())
    assert check_gguf(path, written[1])["tensors"] > 50
    _rewrite(path, change)
    with pytest.raises(ExportError, match=said):
        check_gguf(path, written[1])


def test_a_file_that_is_none_or_cut_off_is_one_line(written: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    whole = (written[0] / GGUF_FILE).read_bytes()
    for content in (b"no", whole[:200], whole[: len(whole) // 2]):
        (tmp_path / GGUF_FILE).write_bytes(content)
        with pytest.raises(ExportError, match="not a readable GGUF file"):
            read_deepseek(tmp_path / GGUF_FILE)
    export_language_model(subject(dense("llama")), tmp_path / "llama", "gguf-f32", verify=False)
    with pytest.raises(ExportError, match="of architecture 'llama', not deepseek2"):
        read_deepseek(tmp_path / "llama" / GGUF_FILE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "'linear'"),
        (LlamaConfig(**{**SIZES, "hidden_act": "gelu"}), "hidden_act is 'gelu'"),
        (MistralConfig(**SIZES, sliding_window=32), "sliding window"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    model = (MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM)(config).eval()
    with pytest.raises(ExportError, match=said):
        export_language_model(subject(model), tmp_path / "out", "gguf-f32")
    assert not (tmp_path / "out" / RECORD).exists()


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = dense("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"ffn_down\.weight has numbers that float16 cannot hold"):
        export_language_model(subject(model), tmp_path / "out", "gguf-f16")

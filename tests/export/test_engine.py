"""Checkpoints for engines: what is written, what stock transformers makes of it, and what is found in damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import CHAT, SIZES, dense, mixture, opened, published, subject
from expert_models import adapted, redrawn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pyra import PyraConfig, wrap
from pyra.adapters import fold_adapter
from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import MTP, check_checkpoint, load_model
from pyra.errors import ConfigError, ExportError, UnsupportedModelError
from pyra.experts import prune_experts
from pyra.export import LANGUAGE_FORMATS, LanguageModel, check_engine_folder, export_language_model
from pyra.export import engine as engine_module
from pyra.export.engine_check import template_of
from pyra.export.engine_names import DEEPSEEK, LLAMA_TYPES, engines_for, needed_shapes
from pyra.export.engine_record import RECORD

IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def values(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    """A JoyAI model for engines, in float32; nobody writes to this folder."""
    folder = tmp_path_factory.mktemp("engine")
    model = mixture(folder / "source")
    export_language_model(model, folder / "out")
    return folder / "out", model


def test_it_is_deepseek_v3_with_what_engines_ask_for(written: tuple[Path, LanguageModel]) -> None:
    folder, model = written
    found = values(folder)
    assert (found["model_type"], found["architectures"]) == (DEEPSEEK, ["DeepseekV3ForCausalLM"])
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 1e4 and found["rope_scaling"] is None
    assert found["dtype"] == found["torch_dtype"] == "float32"
    assert (found["n_routed_experts"], found["num_nextn_predict_layers"], found["topk_method"]) == (8, 1, "noaux_tc")
    assert not {"auto_map", "pyra_prompts", "num_local_experts", "quantization_config"} & found.keys()
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened.chat_template == CHAT == model.tokenizer.chat_template
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_record_says_what_it_was_held_against(written: tuple[Path, LanguageModel]) -> None:
    record = json.loads((written[0] / RECORD).read_text())
    assert [row["engine"] for row in record["engines"]] == ["vLLM", "SGLang", "llama.cpp"]
    mtp = check_checkpoint(written[0]).mtp
    assert all(row["passed_over"] == len(mtp) > 5 for row in record["engines"])
    assert record["reloaded"]["largest_difference"] == record["reloaded"]["weight_difference"] == 0
    assert record["reloaded"]["with"] == "transformers DeepseekV3ForCausalLM" and record["mtp"]["layers"] == 1
    assert record["sha256"].keys() == record["files"].keys() == {p.name for p in written[0].iterdir()} - {RECORD}


@pytest.mark.slow  # transformers is imported anew
def test_it_opens_where_pyra_is_not(written: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(written[0])!r}).eval()\n"
        "ids = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))\n"
        f"with torch.no_grad(): torch.save(model(ids).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not any(name == 'pyra' or name.startswith('pyra.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, logits(written[1].model)) and found.std() > 0.1


def test_mtp_weights_keep_their_bits_and_draft(written: tuple[Path, LanguageModel]) -> None:
    folder, model = written
    before, after = load_file(Path(str(model.mtp)) / MTP), load_file(folder / MTP)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    opened = load_model(folder).eval()
    drafted = opened.generate(IDS[:1], use_mtp=True, max_new_tokens=6, do_sample=False)
    assert torch.equal(drafted, opened.generate(IDS[:1], max_new_tokens=6, do_sample=False))


def test_without_mtp_weights_the_configuration_has_none(written: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    model = written[1]
    record = export_language_model(
        LanguageModel(model.model, model.tokenizer, model.rows, "a", files=model.files), tmp_path / "out"
    )
    assert values(tmp_path / "out")["num_nextn_predict_layers"] == 0 == record.mtp["layers"]
    assert not (tmp_path / "out" / MTP).exists()


@pytest.mark.parametrize("shard", [1, 60_000, 10**9])
def test_shards_hold_each_tensor_once(shard: int, written: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    engine_module.write(written[1], tmp_path / "out", "float32", shard=shard)
    one, many = stored(written[0]), stored(tmp_path / "out")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    own = [value.nbytes for name, value in one.items() if not name.startswith("model.layers.4.")]
    files = list(tmp_path.glob("out/model-0*"))
    least = sum(own) / max(shard, max(own))
    assert len(files) == len(own) if shard == 1 else least <= len(files) <= 2 * least + 1


@pytest.mark.parametrize("name", ["engine", "engine-bf16"])
def test_what_is_rounded_is_the_folded_model_and_the_rest_is_told(name: str, tmp_path: Path) -> None:
    model = mixture(tmp_path / "source")
    model = LanguageModel(model.model, model.tokenizer, model.rows, "a", model.files, dtype="bfloat16", mtp=model.mtp)
    record = export_language_model(model, tmp_path / "out", name)
    tensors = stored(tmp_path / "out")
    kinds = {value.dtype for key, value in tensors.items() if not key.endswith("e_score_correction_bias")}
    assert kinds == {torch.bfloat16} and values(tmp_path / "out")["torch_dtype"] == "bfloat16"
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert record.reloaded is not None and record.reloaded["weight_difference"] == 0
    assert 0 < record.reloaded["relative_difference"] < record.reloaded["tolerance"] == 0.05


def test_int4_experts_are_rounded_once_from_the_float_weights(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = mixture(tmp_path / "source")
    record = export_language_model(model, tmp_path / "out", "engine-int4")
    found = values(tmp_path / "out")["quantization_config"]
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == 32  # the largest that divides the widths
    assert stored(tmp_path / "out")[f"{EXPERT}_packed"].dtype == torch.int32
    assert record.reloaded is not None and record.reloaded["weight_difference"] == 0
    assert record.reloaded["tolerance"] == 1e-4 and record.reloaded["relative_difference"] < 1e-5
    moved = record.reloaded["rounding"]
    assert moved["relative_difference"] > 0.001 and 0 < moved["top1_agreement"] <= 1


def test_expert_adapters_are_folded_and_pruned_experts_are_gone(tmp_path: Path) -> None:
    base = load_model(published(tmp_path / "source"), dtype=torch.float32).eval()
    plain = logits(base)
    model = redrawn(adapted(base))
    trained = logits(model)
    folded = fold_adapter(model)
    export_language_model(subject(folded), tmp_path / "folded")
    reopened = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval())
    assert (reopened - trained).abs().max() < 1e-4 * trained.abs().max() and (trained - plain).abs().max() > 0.01
    prune_experts(folded, [[0, 2, 5, 7]] * 3)
    told = export_language_model(subject(folded, mtp=tmp_path / "source"), tmp_path / "pruned")
    assert values(tmp_path / "pruned")["n_routed_experts"] == 4 and told.mtp["layers"] == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()), logits(folded))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "biased"])
def test_dense_decoders_keep_their_own_names(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    record = export_language_model(opened(model, tmp_path / "source"), tmp_path / "out")
    assert values(tmp_path / "out")["model_type"] == ("llama" if kind == "biased" else kind) == record.model_type
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(reopened) is type(model) and torch.equal(logits(reopened), logits(model))
    assert ("lm_head.weight" in stored(tmp_path / "out")) == (kind not in ("qwen2", "biased"))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0},
    ],
)
def test_positions_are_told_both_ways(rope: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(rope))).eval()
    export_language_model(subject(model), tmp_path / "out")
    found = values(tmp_path / "out")
    assert found["rope_parameters"] == rope and found["rope_theta"] == rope["rope_theta"]
    assert found["rope_scaling"]["type"] == found["rope_scaling"]["rope_type"] == rope["rope_type"]
    assert "rope_theta" not in found["rope_scaling"]
    older = {key: value for key, value in found.items() if key != "rope_parameters"}
    assert LlamaConfig(**older).rope_parameters["factor"] == rope["factor"]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT]


def _turned(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


def _stacked(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 64)


def _one_expert_more(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.replace(".3.", ".8.")] = tensors[EXPERT].clone()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_extra, r"model\.layers\.1\.mlp\.extra\.weight not known"),
        (_missing, rf"{EXPERT} missing"),
        (_turned, rf"{EXPERT} is \[64, 32\], not \[32, 64\]"),
        (_stacked, "gate_up_proj not known"),
        (_one_expert_more, r"experts\.8\.up_proj\.weight not known"),
    ],
)
def test_damage_is_found_by_every_engine_s_list(
    damage: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    model = mixture(tmp_path / "source", num_nextn_predict_layers=0)
    model = LanguageModel(model.model, model.tokenizer, model.rows, "a", model.files)
    export_language_model(model, tmp_path / "out", verify=False)
    assert len(check_engine_folder(tmp_path / "out")) == 3
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ExportError, match=said) as error:
        check_engine_folder(tmp_path / "out")
    assert all(name in str(error.value) for name in ("vLLM", "SGLang", "llama.cpp"))


def test_a_tokenizer_that_opens_as_another_is_refused(tmp_path: Path) -> None:
    """Beside a Qwen2 configuration transformers 5 splits texts as Qwen2 does, whatever the tokenizer's file says."""
    with pytest.raises(ExportError, match="give other ids than the tokenizer"):
        export_language_model(subject(dense("qwen2")), tmp_path / "out")


def test_a_key_that_an_engine_reads_is_missed(tmp_path: Path) -> None:
    export_language_model(subject(dense("llama")), tmp_path / "out", verify=False)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({key: value for key, value in values(path.parent).items() if key != "rope_theta"}))
    with pytest.raises(ExportError, match="leaves rope_theta out"):
        check_engine_folder(tmp_path / "out")


def test_an_mtp_layer_that_lacks_a_weight_is_found(tmp_path: Path) -> None:
    export_language_model(mixture(tmp_path / "source"), tmp_path / "out", verify=False)
    index = tmp_path / "out" / "model.safetensors.index.json"
    told, tensors = json.loads(index.read_text()), load_file(tmp_path / "out" / MTP)
    del tensors["model.layers.4.eh_proj.weight"]
    save_file(tensors, tmp_path / "out" / MTP)
    with pytest.raises(ExportError, match=r"index\.json does not say what the files hold: model\.layers\.4\.eh_proj"):
        check_engine_folder(tmp_path / "out")
    del told["weight_map"]["model.layers.4.eh_proj.weight"]
    index.write_text(json.dumps(told))
    with pytest.raises(ExportError, match=r"MTP: model\.layers\.4\.eh_proj\.weight missing"):
        check_engine_folder(tmp_path / "out")


def test_a_wrong_weight_is_found_by_reloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyra.export import engine_weights

    apart = engine_weights._apart

    def swapped(name: str, value: Tensor) -> Any:
        for own, part in apart(name, value):
            sides = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            stem, _, side = own.removesuffix(".weight").rpartition(".")
            yield f"{stem}.{sides.get(side, side)}.weight" if ".experts." in own else own, part

    monkeypatch.setattr(engine_weights, "_apart", swapped)
    with pytest.raises(ExportError, match="a weight that was read back is"):
        export_language_model(mixture(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()


def test_reloading_is_skipped_only_when_asked(tmp_path: Path) -> None:
    assert export_language_model(subject(dense("llama")), tmp_path / "a", verify=False).reloaded is None
    with pytest.raises(ExportError, match="more than the tolerance 0"):
        export_language_model(subject(dense("llama")), tmp_path / "b", "engine-bf16", tolerance=0.0)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=400)), UnsupportedModelError,
         "does not say which token|not written for engines"),
        (lambda: wrap(dense("llama"), PyraConfig(keep={0: 0.5})), ExportError, "merges prompts"),
        (lambda: joyai.JoyAIForCausalLM(joyai.tiny_config(rms_norm_eps=1e-5, vocab_size=400)), ExportError,
         "rms_norm_eps is 1e-05"),
        (lambda: joyai.JoyAIForCausalLM(joyai.tiny_config(rope_interleave=False, vocab_size=400)), ExportError,
         "rope_interleave is false"),
        (lambda: joyai.JoyAIForCausalLM(joyai.tiny_config(vocab_size=300)), ConfigError, "another model's"),
    ],
)  # fmt: skip
def test_what_engines_do_otherwise_is_refused(
    make: Callable[[], nn.Module], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        export_language_model(subject(make()), tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()


def test_names_of_formats() -> None:
    with pytest.raises(ConfigError, match="did you mean 'engine'"):
        export_language_model(subject(dense("llama")), "unused", "engin")
    with pytest.raises(ConfigError, match="onnx is for image models; a language model is written as engine"):
        export_language_model(subject(dense("llama")), "unused", "onnx")
    assert all(name == format.name for name, format in LANGUAGE_FORMATS.items())


def test_every_engine_has_a_parameter_for_every_needed_tensor() -> None:
    config = {**joyai.tiny_config().to_dict(), "model_type": DEEPSEEK}
    without_rank = {**config, "q_lora_rank": None}
    for told in (config, without_rank):
        own = {name for name in joyai.JoyAIForCausalLM(joyai.JoyAIConfig(**{
            key: value for key, value in told.items() if key != "model_type"
        })).state_dict() if ".experts." not in name}  # fmt: skip
        needed = needed_shapes(told)
        assert own == {name for name in needed if ".mlp.experts." not in name}
        for engine in engines_for(DEEPSEEK):
            assert {template_of(name) for name in needed} <= engine.parameters.keys()
    for kind in LLAMA_TYPES:
        model = dense(kind)
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        expected = needed_shapes(model.config.to_dict())  # type: ignore[union-attr, operator]
        assert {name: shapes[name] for name in expected} == expected
        assert shapes.keys() - expected.keys() <= {"lm_head.weight"}
        assert all({template_of(n) for n in expected} <= engine.parameters.keys() for engine in engines_for(kind))

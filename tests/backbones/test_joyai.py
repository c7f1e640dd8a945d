"""JoyAI-LLM Flash: the published sizes on the meta device, the published layout with a tiny model of the family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from joyai_releases import write_published
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_layers import MtpModel

from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import (
    INDEX,
    MTP,
    SINGLE,
    check_checkpoint,
    check_tokenizer,
    load_model,
    save_checkpoint,
)
from pyra.backbones.joyai_placement import PLANS, place
from pyra.errors import CheckpointError, ConfigError, OutputError

GB = 10**9
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published", joyai.tiny_config())


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 512, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def test_the_published_numbers_of_weights() -> None:
    assert joyai.parameter_count() == {"without_mtp": 48_942_532_608, "with_mtp": 49_286_094_592}


def test_a_model_without_mtp_layers_has_one_number() -> None:
    count = joyai.parameter_count(joyai.tiny_config(num_nextn_predict_layers=0))
    assert count["without_mtp"] == count["with_mtp"]


def test_the_published_configuration() -> None:
    config = joyai.config()
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("joyai_llm_flash", 2048, 40)
    assert config.rope_parameters["rope_theta"] == 3.2e7 and config.qk_head_dim == 192
    assert config.get_mtp_config().first_k_dense_replace == config.get_mtp_config().num_hidden_layers == 1
    assert config.first_k_dense_replace == 1  # the copy has changed, not this one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hiden_size": 4}, "has no hiden_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts"),
        ({"n_group": 3}, "8 experts do not make 3 equal groups"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace is 5, of 4 layers"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        joyai.tiny_config(**changes)


def test_a_published_folder_opens_as_the_stock_model_of_its_weights(published: Path) -> None:
    model = load_model(published).eval()
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**_plain(model.config))).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens()), logits(stock, tokens()))
    expert = load_file(published / "model-3-of-4.safetensors")["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert torch.equal(model.model.layers[2].mlp.experts.gate_up_proj[5, 32:], expert)


def _plain(config: joyai.JoyAIConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}


def test_earlier_copies_call_themselves_deepseek(tmp_path: Path, published: Path) -> None:
    earlier = write_published(tmp_path / "earlier", joyai.tiny_config(), model_type="deepseek_v3")
    assert torch.equal(logits(load_model(earlier).eval(), tokens()), logits(load_model(published).eval(), tokens()))


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_it_is_written_back_bit_for_bit(published: Path, tmp_path: Path, shard: str) -> None:
    save_checkpoint(load_model(published), tmp_path / "again", mtp=published, shard=shard)
    before, after = stored(published), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    index = json.loads((tmp_path / "again" / INDEX).read_text())
    assert index["weight_map"].keys() == before.keys()
    assert check_checkpoint(tmp_path / "again").mtp == check_checkpoint(published).mtp != []
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_without_mtp_weights_the_configuration_has_none(published: Path, tmp_path: Path) -> None:
    save_checkpoint(load_model(published), tmp_path / "a")
    assert load_model(tmp_path / "a").config.num_nextn_predict_layers == 0
    assert not (tmp_path / "a" / MTP).exists() and check_checkpoint(tmp_path / "a").mtp == []
    with pytest.raises(CheckpointError, match="holds no MTP weights"):
        save_checkpoint(load_model(published), tmp_path / "b", mtp=tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_a_folder_in_use_is_not_written_to(published: Path) -> None:
    with pytest.raises(OutputError, match="is there already"):
        save_checkpoint(load_model(published), published)


def test_mtp_layers_of_another_model_are_refused(published: Path, tmp_path: Path) -> None:
    other = write_published(tmp_path / "other", joyai.tiny_config(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="follows 3 layers of width 64, the model has 4 of width 64"):
        save_checkpoint(load_model(published), tmp_path / "a", mtp=other)


def test_drafting_by_the_dense_mtp_layer_is_greedy_decoding(published: Path) -> None:
    model = load_model(published).eval()
    greedy, drafted = (
        model.generate(tokens(1), max_new_tokens=12, do_sample=False, use_mtp=asked, pad_token_id=1, eos_token_id=None)
        for asked in (False, True)
    )
    assert torch.equal(greedy, drafted)


def test_the_mtp_layer_that_drafts_is_dense_and_holds_the_published_weights(published: Path) -> None:
    drafting = MtpModel.from_pretrained(load_model(published))
    (layer,) = drafting.layers
    stem, file = "model.layers.4.", load_file(published / MTP)
    held = {
        "mlp.gate_proj.weight": layer.mtp_block.mlp.gate_proj.weight,
        "self_attn.o_proj.weight": layer.mtp_block.self_attn.o_proj.weight,
        "eh_proj.weight": layer.eh_proj.weight,
        "shared_head.norm.weight": layer.post_norm.weight,
    }
    assert all(torch.equal(value, file[stem + name]) for name, value in held.items())


def test_implementations_of_experts_agree_with_more_precise_ones(published: Path) -> None:
    model = load_model(published).eval()
    assert model.config._experts_implementation == "grouped_mm"
    exact = load_model(published, experts_implementation="eager").eval().double()
    expected = logits(exact, tokens())
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        assert (logits(model, tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_routers_bias_stays_float32(published: Path) -> None:
    model = load_model(published, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


FIRST = (
    "from transformers import AutoConfig",
    "from transformers import AutoModelForCausalLM",
    "from transformers import ViTConfig",
    "from transformers import DeepseekV3Config",
    "import transformers.models.deepseek_v3.modeling_deepseek_v3",
    "from transformers import ViTForImageClassification",
    "import transformers.models.vit.modeling_vit",
    "import peft",
    "from pyra.backbones import joyai",
    "import pyra.export.auto",
)


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=() if place < 2 else pytest.mark.slow) for place, first in enumerate(FIRST)],
)  # each in a process of its own, which imports transformers
def test_the_auto_classes_know_it_whatever_is_imported_first(first: str, published: Path) -> None:
    script = f"""
import sys, pyra
assert "transformers" not in sys.modules
{first}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
print(*(type(auto.from_pretrained(sys.argv[1])).__name__ for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)))
assert type(AutoConfig.for_model("pyra")) in AutoModelForImageClassification._model_mapping
"""
    done = subprocess.run([sys.executable, "-c", script, str(published)], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["JoyAIConfig", "JoyAIModel", "JoyAIForCausalLM"], done.stderr


def rewrite(folder: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def without_norm(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def truncate(folder: Path) -> None:
    path = folder / "model-2-of-4.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def set_index(value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(value)) and None


def lose_an_expert(folder: Path) -> None:
    name, index = "model.layers.1.mlp.experts.3.up_proj.weight", json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json there; give the folder of a checkpoint"),
    "config of a llama": (set_config(model_type="llama"), "model_type is 'llama', not one of joyai_llm_flash"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config of wrong types": (set_config(hidden_size="wide"), "hidden_size"),
    "more experts than there are": (set_config(n_routed_experts=16), "layer 1 lacks gate_proj of experts 8, 9, 10, 11"),
    "fewer experts": (set_config(n_routed_experts=4), "layer 1 has 8 experts, not 4"),
    "another width": (set_config(hidden_size=32), r"model.embed_tokens.weight is \[512, 64\], not \[512, 32\]"),
    "wider experts": (
        set_config(moe_intermediate_size=48),
        r"gate_proj.weight is \[32, 64\], not \[48, 64\]",
    ),
    "a lost expert": (lose_an_expert, "layer 1 lacks up_proj of experts 3"),
    "a shard missing": (lambda f: (f / "model-2-of-4.safetensors").unlink(), "model-2-of-4.safetensors is missing"),
    "a shard cut off": (truncate, r"model-2-of-4.safetensors has \d+ bytes, its header says \d+"),
    "a shard of nothing": (lambda f: (f / "model-2-of-4.safetensors").write_bytes(b""), "is cut off or no"),
    "a shard of text": (
        lambda f: (f / "model-2-of-4.safetensors").write_text("x" * 99),
        "is cut off or no",
    ),
    "a header of text": (
        lambda f: (f / "model-2-of-4.safetensors").write_bytes(b"\4" + bytes(7) + b"text"),
        "header cannot be read",
    ),
    "a tensor gone from its shard": (
        lambda f: rewrite(f, "model-2-of-4.safetensors", without_norm),
        f"does not hold {NORM}",
    ),
    "an index without a map": (set_index({}), "has no weight_map"),
    "an index that leads out": (set_index({"weight_map": {"a": "../b.safetensors"}}), "is no file beside it"),
    "nothing to read": (lambda f: (f / INDEX).unlink(), f"holds neither {SINGLE} nor {INDEX}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_told_in_one_line(damage: str, published: Path) -> None:
    change, said = DAMAGE[damage]
    change(published)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(published)
    assert "\n" not in str(caught.value) and str(published) in str(caught.value)


def test_nothing_that_a_configuration_names_is_fetched_or_run(published: Path) -> None:
    (published / "evil.py").write_text("raise SystemExit('ran')")
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
    set_config(**dict.fromkeys(keys, "evil/kernel"), auto_map={"AutoModelForCausalLM": "evil.Evil"})(published)
    model = load_model(published)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "grouped_mm")


def test_a_model_with_an_adapter_around_it_is_not_written(published: Path, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(load_model(published), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ConfigError, match="got PeftModel: fold its adapter first"):
        save_checkpoint(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tensors_that_an_index_leaves_out_are_named(published: Path) -> None:
    index = json.loads((published / INDEX).read_text())
    del index["weight_map"][NORM]
    (published / INDEX).write_text(json.dumps(index))
    rewrite(published, "model-2-of-4.safetensors", without_norm)
    with pytest.raises(CheckpointError, match=f"leaves {NORM} out"):
        load_model(published)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("memory", [[140 * GB], [80 * GB] * 2, [24 * GB] * 8])
def test_the_published_model_fits(plan: Any, memory: list[int]) -> None:
    placed = place(memory, plan=plan)
    count, biases = joyai.parameter_count()["without_mtp"], 39 * 256
    assert all(held <= room for held, room in zip(placed.weight_bytes, memory, strict=True))
    if plan == "layers":
        assert sum(placed.weight_bytes) == 2 * count + 4 * biases
        assert list(placed.device_map.values()) == sorted(placed.device_map.values())  # in the order of the forward
        assert max(placed.weight_bytes) - min(placed.weight_bytes) <= placed.largest_layer
    else:
        assert sum(placed.weight_bytes) >= 2 * count + 4 * biases and placed.device_map == {}


def test_layers_are_placed_by_what_each_device_has() -> None:
    large, small = place([80 * GB, 40 * GB]).weight_bytes
    assert 1.7 < large / small < 2.3


def test_a_device_map_names_every_module(published: Path) -> None:
    placed = place([10**7], configuration=joyai.tiny_config(), dtype="float32")
    model = load_model(published, device_map=dict.fromkeys(placed.device_map, "cpu"))
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(f"{part}.") for part in placed.device_map) for name in names)
    assert placed.weight_bytes == (sum(value.nbytes for value in model.state_dict().values()),)


def test_a_placed_model_runs_as_a_whole_one_does(published: Path, tmp_path: Path) -> None:
    placed = place([10**6] * 3, configuration=joyai.tiny_config(), dtype="float32")
    assert set(placed.device_map.values()) == {0, 1, 2}
    devices = {name: ("cpu", "disk", "cpu")[at] for name, at in placed.device_map.items()}
    model = load_model(published, device_map=devices, offload_folder=tmp_path / "offloaded")
    assert {"cpu", "meta"} == {parameter.device.type for parameter in model.parameters()}
    assert torch.equal(logits(model, tokens()), logits(load_model(published), tokens()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"memory": [24 * GB] * 2},
            r"the weights take 97.9 GB, .* do not fit into 24.0 GB",
        ),
        ({"memory": [24 * GB] * 2, "plan": "fsdp2"}, "fsdp2 takes .* of weights on each of 2 devices"),
        ({"memory": [80 * GB] * 3, "plan": "expert-parallel"}, "256 experts cannot be shared out equally to 3 devices"),
        ({"memory": []}, "memory must name the bytes"),
        ({"memory": [80 * GB], "dtype": "bf16"}, "dtype must be a name of torch, such as bfloat16, got 'bf16'"),
        ({"memory": [0]}, "memory must name the bytes"),
        ({"memory": [80 * GB], "plan": "tensor"}, "plan must be one of layers, fsdp2, expert-parallel"),
    ],
)
def test_what_does_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place(**arguments)


def tokenizer(bos: str | None, *, in_front: bool = True, size: int = 300) -> Any:
    words = {word: index for index, word in enumerate(["<s>", "</s>", "a", *map(str, range(size))])}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if in_front:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos)


def test_a_tokenizer_that_fits() -> None:
    check_tokenizer(tokenizer("<s>"), joyai.tiny_config())
    check_tokenizer(tokenizer(None, in_front=False), joyai.tiny_config(bos_token_id=None))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (tokenizer(None), r"\(BOS\) is None, the model's 0"),
        (tokenizer("</s>"), r"\(BOS\) is 1, the model's 0"),
        (tokenizer("<s>", in_front=False), r"does not begin a text with BOS \(0\)"),
        (tokenizer("<s>", size=600), "the tokenizer has 603 tokens, the model 512"),
    ],
    ids=["none", "another", "not in front", "larger"],
)
def test_a_tokenizer_that_does_not_fit(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_tokenizer(wrong, joyai.tiny_config())

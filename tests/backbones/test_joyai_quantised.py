"""Quantised releases of JoyAI-LLM Flash: what their tensors stand for, and what is told of those that are not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from joyai_releases import GROUP, QUANTISERS, TOLD, int4_groups, write_quantised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.backbones.joyai_checkpoint import INDEX, check_checkpoint, load_model, save_checkpoint
from pyra.backbones.joyai_dequantised import dequantise, unpack
from pyra.backbones.joyai_mtp import detach_mtp
from pyra.backbones.joyai_quantised import read_scheme
from pyra.errors import CheckpointError, ConfigError
from pyra.tasks.language.models import load_decoder

NAMES = {
    "fp8-blocks": "FP8 in blocks of 32 × 32",
    "fp8-rows": "FP8, a scale a row",
    "fp8-matrix": "FP8, a scale a matrix",
    "int8-rows": "INT8, a scale a row",
    "int4-groups": "INT4 in groups of 16",
}
SHARD = "model-2-of-4.safetensors"  # of layer 1
NARROW = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 40 rows in blocks of 32
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tell(folder: Path, told: dict[str, Any] | None) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": told}))


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_quantised_release_is_named_and_opens_as_what_it_stands_for(kind: str, tmp_path: Path) -> None:
    meant = write_quantised(tmp_path / "release", kind)
    checked = check_checkpoint(tmp_path / "release")
    assert checked.quantised == NAMES[kind]
    assert checked.shapes == {name: list(value.shape) for name, value in meant.items()}
    model = load_model(tmp_path / "release")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    save_checkpoint(model, tmp_path / "floats", mtp=tmp_path / "release")
    written = stored(tmp_path / "floats")
    assert written.keys() == meant.keys()
    assert [name for name, value in written.items() if not torch.equal(value, meant[name].to(value.dtype))] == []
    told = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert "quantization_config" not in told and told["num_nextn_predict_layers"] == 1
    assert check_checkpoint(tmp_path / "floats").quantised is None


@pytest.mark.parametrize("kind", ["fp8-blocks", "int4-groups"])
def test_it_opens_in_float32_and_across_devices(kind: str, tmp_path: Path) -> None:
    meant = write_quantised(tmp_path / "release", kind)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    devices = {**dict.fromkeys(parts, "cpu"), "model.layers.2": "disk", "model.layers.3": "disk"}
    whole = load_model(tmp_path / "release", dtype=torch.float32)
    assert torch.equal(whole.model.layers[1].mlp.experts.gate_up_proj[3, 32:], meant[EXPERT])
    spread = load_model(
        tmp_path / "release", dtype=torch.float32, device_map=devices, offload_folder=tmp_path / "offloaded"
    )
    ids = torch.arange(2, 14).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, whole(ids).logits)


def test_tasks_open_it_the_same_way(tmp_path: Path) -> None:
    meant = write_quantised(tmp_path / "release", "fp8-blocks")
    weight = load_decoder(str(tmp_path / "release")).get_parameter(NARROW)
    assert torch.equal(weight, meant[NARROW])


def test_its_settings_of_generation_come_along(tmp_path: Path) -> None:
    write_quantised(tmp_path / "release", "int4-groups")
    GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(tmp_path / "release")
    assert load_model(tmp_path / "release").generation_config.temperature == 0.6


def drafted(model: nn.Module) -> Tensor:
    ids = torch.arange(2, 14).unsqueeze(0)
    made = [
        model.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=asked, pad_token_id=1, eos_token_id=None)
        for asked in (False, True)
    ]
    assert torch.equal(*made)
    return made[0]


def test_the_mtp_layer_drafts_where_it_is_float(tmp_path: Path) -> None:
    write_quantised(tmp_path / "int4", "int4-groups")
    drafted(load_model(tmp_path / "int4"))


def test_a_quantised_mtp_layer_drafts_as_floats(tmp_path: Path) -> None:
    meant = write_quantised(tmp_path / "fp8", "fp8-blocks")
    model = load_model(tmp_path / "fp8", mtp=True)
    weight = model.get_parameter("mtp.mtp_block.mlp.up_proj.weight")
    assert torch.equal(weight, meant["model.layers.4.mlp.up_proj.weight"].bfloat16())
    drafted(model)
    model = detach_mtp(model)
    drafted(model)  # by the layer in the folder
    save_checkpoint(model, tmp_path / "floats", mtp=tmp_path / "fp8")
    drafted(load_model(tmp_path / "floats"))


def test_words_that_compressed_tensors_packed() -> None:
    four = [-8, 7, 0, -1, 1, -7, 3, 5, 2, -3, 6, -8, 7, 4, -2, -5]  # by its pack_to_int32, release 0.20.0
    assert unpack(torch.tensor([[-619087632, 919539290]], dtype=torch.int32), 4, 16).tolist() == [four]
    eight = torch.tensor([[2139160320, 133]], dtype=torch.int32)
    assert unpack(eight, 8, 5).tolist() == [[-128, 127, 0, -1, 5]]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("int", "group"), ("int", "channel"), *(("float", each) for each in ("group", "channel", "tensor", "block"))],
)
def test_compressed_tensors_reads_the_same(kind: str, strategy: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compares with the library's own decompression")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    format, bits = ("pack-quantized", 4) if kind == "int" else ("float-quantized", 8)
    sizes = {"group": {"group_size": 16}, "block": {"block_structure": [16, 16]}}.get(strategy, {})
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=True, **sizes)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    shape, block = {
        "group": ((48, 4), (1, 16)),
        "channel": ((48, 1), (1, 64)),
        "tensor": ((1,), (48, 64)),
        "block": ((3, 4), (16, 16)),
    }[strategy]
    generator = torch.Generator().manual_seed(0)
    scale = 0.01 + 0.02 * torch.rand(shape, generator=generator)
    weight = 0.1 * torch.randn(48, 64, generator=generator)
    library = BaseCompressor.get_value_from_registry(format)
    packed = library.compress({"weight": weight, "weight_scale": scale}, scheme)
    values = unpack(packed["weight_packed"], 4, 64) if kind == "int" else packed["weight"]
    expected = library.decompress(packed, scheme)["weight"]
    assert torch.equal(dequantise(values, scale, block), expected.float())
    assert (expected - weight).abs().mean() < 0.05  # something was compressed


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    index["weight_map"] |= dict.fromkeys(tensors, SHARD)
    (folder / INDEX).write_text(json.dumps(index))


def put(part: str, value: Tensor | None) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(EXPERT + part, None)
        if value is not None:
            tensors[EXPERT + part] = value

    return lambda folder: rewrite(folder, change)


def told(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: tell(folder, {**TOLD["int4-groups"], **changes})


def told_weights(**changes: Any) -> Callable[[Path], None]:
    weights = {**TOLD["int4-groups"]["config_groups"]["group_0"]["weights"], **changes}
    return told(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})


WIDER = int4_groups(torch.ones(32, 2 * 64))[0]
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: tell(f, None), "is quantised, and config.json has no quantization_config"),
    "another method": (told(quant_method="gptq"), "quant_method is 'gptq', not one of fp8, compressed-tensors"),
    "not symmetric": (told_weights(symmetric=False), "weights are not symmetric.*: open the bfloat16 release"),
    "rotated": (told(transform_config={"R1": {}}), "it has a transform_config"),
    "three bits": (told_weights(num_bits=3), "weight_packed is no integers in 32-bit words"),
    "another group": (told_weights(group_size=8), r"of \[32, 64\] has scales of \[32, 4\], which its config"),
    "a group of nothing": (told_weights(group_size=0), "a group has no size"),
    "no groups": (told(config_groups=None), "it cannot be read"),
    "no scale": (put("_scale", None), f"{EXPERT} has no scale"),
    "a scale of integers": (put("_scale", torch.ones(32, 4, dtype=torch.uint8)), "has no scale of floats"),
    "values without rows": (put("_packed", torch.tensor(1, dtype=torch.int32)), "is no integers in 32-bit words"),
    "no values": (put("_packed", None), f"{EXPERT} is left out"),
    "an order of columns": (put("_g_idx", torch.zeros(64)), "weight_g_idx is of a kind that is not read"),
    "values that are wider": (
        lambda f: [put(part, WIDER[part])(f) for part in ("_packed", "_scale")],
        r"is \[32, 128\], not \[32, 64\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_read_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    write_quantised(tmp_path / "release", "int4-groups")
    change, said = DAMAGE[damage]
    change(tmp_path / "release")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(tmp_path / "release")
    assert "\n" not in str(caught.value) and str(tmp_path / "release") in str(caught.value)


def test_floats_whose_configuration_still_speaks_of_fp8_open_as_they_are(tmp_path: Path) -> None:
    write_quantised(tmp_path / "release", "fp8-blocks")
    save_checkpoint(load_model(tmp_path / "release"), tmp_path / "floats")
    tell(tmp_path / "floats", TOLD["fp8-blocks"])
    model = load_model(tmp_path / "floats")
    assert check_checkpoint(tmp_path / "floats").quantised is None
    assert torch.equal(model.lm_head.weight, load_model(tmp_path / "release").lm_head.weight)
    model.config.quantization_config = TOLD["fp8-blocks"]
    save_checkpoint(model, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_second_quantisation_is_refused(tmp_path: Path) -> None:
    write_quantised(tmp_path / "release", "fp8-rows")
    with pytest.raises(ConfigError, match="is quantised already"):
        load_model(tmp_path / "release", quantization_config={"quant_method": "fp8"})


def test_a_model_that_transformers_holds_quantised_is_not_written(tmp_path: Path) -> None:
    class Quantiser:
        quantization_config = TOLD["int4-groups"]

    write_quantised(tmp_path / "release", "int4-groups")
    model: Any = load_model(tmp_path / "release")
    assert isinstance(model, JoyAIForCausalLM)
    model.hf_quantizer = Quantiser()
    with pytest.raises(ConfigError, match="this model is quantised: open its folder with load_model"):
        save_checkpoint(model, tmp_path / "a")


def test_mixed_schemes_are_named() -> None:
    groups = {
        f"group_{i}": TOLD[kind]["config_groups"]["group_0"] for i, kind in enumerate(("fp8-rows", "int4-groups"))
    }
    scheme = read_scheme({**TOLD["int4-groups"], "config_groups": groups})
    assert (scheme.name, scheme.bits, scheme.blocks) == (
        "FP8, a scale a row; INT4 in groups of 16",
        4,
        ((1, GROUP),),
    )

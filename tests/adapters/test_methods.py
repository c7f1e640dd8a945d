"""Every PEFT method: adapt, train, save, load, fold, on a timm ViT, a transformers ViT and a decoder.

The two ViTs merge tokens and re-activate them. Images are compared as logits, text as logits of every position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from backbone_families import build, config, images, result, run
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from pyra import unwrap, wrap
from pyra.adapters import BottleneckConfig, VisualPromptsConfig, adapt, fold_adapter, load_adapter, save_adapter
from pyra.backbones import wrapped_config
from pyra.errors import ConfigError

STEPS = 6

# None of them names its target modules: that is adapt's and PEFT's part.
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=3, init_lora_weights="pissa"),
    "pissa-drawn": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa_niter_1"),
    "pissa-rslora-dora": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=3,
        init_lora_weights="pissa",
        use_rslora=True,
        use_dora=True,
        rank_pattern={r".*\.0\..*": 2},
        alpha_pattern={r".*\.1\..*": 5},
    ),
    "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=STEPS, tinit=1, tfinal=2, deltaT=1),
    "ia3": lambda: peft.IA3Config(),
    "vera": lambda: peft.VeraConfig(r=8),
    "vera-seeded": lambda: peft.VeraConfig(r=8, save_projection=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=8),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2),
    "loha": lambda: peft.LoHaConfig(r=2),
    "lokr": lambda: peft.LoKrConfig(r=2),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=30),
    "ln_tuning": lambda: peft.LNTuningConfig(),
    "bottleneck": lambda: BottleneckConfig(width=4),
    "prompts-shallow": lambda: VisualPromptsConfig(num_prompts=3, deep=False),
    "prompts-deep": lambda: VisualPromptsConfig(num_prompts=3),
    "bottleneck-parallel": lambda: BottleneckConfig(width=4, placement="parallel", scale=0.5),
}


pytestmark = pytest.mark.usefixtures("no_cuda_extension")


def decoder(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = transformers.LlamaConfig(**sizes, vocab_size=50, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(settings).eval()


MODELS = {"timm": lambda: build("timm-vit"), "hf": lambda: build("hf-vit"), "decoder": decoder}
# What has no place on a decoder; test_prompts_of_images_are_refused_for_words holds the reason.
IMAGES_ONLY = ("prompts-shallow", "prompts-deep")
PAIRS = [(method, kind) for method in METHODS for kind in MODELS if kind != "decoder" or method not in IMAGES_ONLY]
MERGING = {"timm": config(), "hf": config(), "decoder": None}


def outputs(model: nn.Module, kind: str) -> Tensor:
    if kind != "decoder":
        return result(run(model, images()))
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=tokens).logits
    return logits


def values(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return outputs(model.eval(), kind)


def adapted(kind: str, method: str) -> nn.Module:
    torch.manual_seed(3)  # what a method draws at its start; loading must not depend on it
    return adapt(MODELS[kind](), pyra=MERGING[kind], peft=METHODS[method]())


def train(model: nn.Module, kind: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        (outputs(model, kind).square().mean() - 0.3).abs().backward()
        optimizer.step()
        if isinstance(model.base_model, peft.AdaLoraModel):
            model.base_model.update_and_allocate(step + 1)
    model.eval()


def changed(model: nn.Module, kind: str) -> list[str]:
    """Name the weights that the backbone does not have so, heads and re-activation apart."""
    base = MODELS[kind]().state_dict()
    return [
        name
        for name, value in model.state_dict().items()
        if not any(part in name for part in ("head.", "classifier.", "reactivation."))
        and not (name in base and torch.equal(value, base[name]))
    ]


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_round_trip(method: str, kind: str, tmp_path: Path) -> None:
    base = values(MODELS[kind](), kind)
    model = adapted(kind, method)
    start = values(model, kind)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, kind)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    expected = values(model, kind)
    for other in (base, start):
        assert (expected - other).abs().max() > 0.01, "the training must show"

    save_adapter(model, tmp_path)
    torch.manual_seed(4)
    loaded = load_adapter(MODELS[kind](), tmp_path)
    assert wrapped_config(loaded) == MERGING[kind]
    torch.testing.assert_close(values(loaded, kind), expected, atol=1e-5, rtol=1e-4)

    folded = fold_adapter(loaded)
    torch.testing.assert_close(values(folded, kind), expected, atol=1e-5, rtol=1e-4)
    assert (values(folded, kind) - base).abs().max() > 0.01
    assert changed(folded, kind), "the method itself must show, not only head and re-activation"
    assert not any(isinstance(module, BaseTunerLayer) for module in folded.modules())
    assert wrapped_config(folded) == MERGING[kind]
    assert fold_adapter(folded) is folded
    assert fold_adapter(loaded) is folded, "folding twice changes nothing"
    torch.testing.assert_close(values(folded, kind), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_stock_peft_reads_the_folder(method: str, kind: str, tmp_path: Path) -> None:
    """Onto a backbone that does not merge; it has no place for re-activation weights."""
    model = adapted(kind, method)
    train(model, kind)
    save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path))
    torch.testing.assert_close(values(stock, kind), values(unwrap(model), kind), atol=1e-5, rtol=1e-4)
    assert (values(stock, kind) - values(MODELS[kind](), kind)).abs().max() > 0.01


# With PEFT's own defaults; the rest of its methods need sizes that a tiny model has not, further inputs, or words.
FURTHER = ["DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "OSF", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA", "WAVEFT"]
FURTHER += ["PVERA", "BEFT", "DEFT", "PEANUT", "SUPERTUNING", "FROD"]


@pytest.mark.parametrize("kind", FURTHER)
def test_further_methods(kind: str, tmp_path: Path) -> None:
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    torch.manual_seed(3)
    model = adapt(build("timm-vit"), pyra=config(), peft=PEFT_TYPE_TO_CONFIG_MAPPING[kind]())
    start = values(model, "timm")
    train(model, "timm")
    expected = values(model, "timm")
    assert (expected - start).abs().max() > 0.01
    save_adapter(model, tmp_path)
    torch.manual_seed(4)
    loaded = load_adapter(build("timm-vit"), tmp_path)
    torch.testing.assert_close(values(loaded, "timm"), expected, atol=1e-5, rtol=1e-4)
    folded = fold_adapter(loaded)
    torch.testing.assert_close(values(folded, "timm"), expected, atol=1e-5, rtol=1e-4)
    assert changed(folded, "timm")


@pytest.mark.parametrize("method", ["lora", "ia3", "prompts-deep", "bottleneck", "bottleneck-parallel"])
def test_half_precision(method: str, tmp_path: Path) -> None:
    """PEFT keeps adapters in float32 beside a 16-bit backbone."""
    pixels = images()["pixel_values"].bfloat16()

    def run_in_half(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.eval()(pixels)
        return logits

    model = adapt(build("timm-vit").bfloat16(), pyra=config(), peft=METHODS[method]())
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "ia3_l", "visual_prompts", "bottleneck_")):
            nn.init.normal_(parameter, std=0.1)
    expected = run_in_half(model)
    assert expected.dtype == torch.bfloat16
    assert not torch.equal(expected, run_in_half(wrap(build("timm-vit").bfloat16(), config())))
    save_adapter(model, tmp_path)
    loaded = load_adapter(build("timm-vit").bfloat16(), tmp_path)
    assert torch.equal(run_in_half(loaded), expected)
    folded = run_in_half(fold_adapter(loaded))
    assert folded.dtype == torch.bfloat16


def test_where_methods_attach_on_their_own() -> None:
    def attached(kind: str, method: str) -> set[str]:
        model = adapted(kind, method).get_base_model()
        return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    blocks = range(3)
    assert attached("timm", "ia3") == {f"blocks.{i}.attn.qkv" for i in blocks}
    assert attached("timm", "ln_tuning") == {f"blocks.{i}.{n}" for i in blocks for n in ("norm1", "norm2")} | {"norm"}
    assert attached("hf", "ln_tuning") == {
        f"vit.layers.{i}.layernorm_{n}" for i in blocks for n in ("before", "after")
    } | {"vit.layernorm"}
    assert attached("decoder", "lora") == {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}


def test_adalora_stores_the_ranks_that_are_left(tmp_path: Path) -> None:
    model = adapted("timm", "adalora")
    train(model, "timm")
    save_adapter(model, tmp_path)
    rows = [len(value) for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in key]
    assert len(rows) == 3
    assert sum(rows) == 3 * 3, "the ranks of three layers, 6 at the start, come down to 3 on average"
    save_adapter(load_adapter(MODELS["timm"](), tmp_path), tmp_path / "again")
    again = load_adapter(MODELS["timm"](), tmp_path / "again")
    torch.testing.assert_close(values(again, "timm"), values(model, "timm"), atol=1e-5, rtol=1e-4)


def test_boft_is_saved_as_it_was_made(tmp_path: Path) -> None:
    """Asked for two factors, PEFT makes one without its CUDA extension; where it has one, loading would make two."""
    save_adapter(adapted("timm", "boft"), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert METHODS["boft"]().boft_n_butterfly_factor == 2
    assert settings["boft_n_butterfly_factor"] == 1
    assert {len(value) for key, value in weights.items() if "boft_R" in key} == {1}


def test_pissa_is_saved_as_lora_that_needs_no_decomposition(tmp_path: Path) -> None:
    model = adapted("timm", "pissa")
    before = values(model, "timm")
    save_adapter(model, tmp_path / "untrained")
    train(model, "timm")
    save_adapter(model, tmp_path / "trained")
    settings = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"], settings["lora_alpha"]) == (True, 8, 6)
    for folder, expected in (("untrained", before), ("trained", values(model, "timm"))):
        loaded = load_adapter(MODELS["timm"](), tmp_path / folder)
        weights = dict(loaded.get_base_model().named_parameters())
        for name, value in MODELS["timm"]().named_parameters():
            if "qkv.weight" in name:
                assert torch.equal(weights[name.replace("qkv", "qkv.base_layer")], value)
        torch.testing.assert_close(values(loaded, "timm"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_weights_come_back_where_a_start_that_moves_them_fails(start: str) -> None:
    model = build("timm-vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The first target can be adapted, the norm after it cannot.
    with pytest.raises(ConfigError, match="peft cannot attach LoraConfig"):
        adapt(model, pyra=config(), peft=peft.LoraConfig(init_lora_weights=start, target_modules=["qkv", "norm2"]))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", ["lora", {"r": 8}, peft.LoraConfig, 8])
def test_what_is_no_configuration(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig\(r=8\).*peft_config\('lora', rank=8\).*got"):
        adapt(build("timm-vit"), peft=wrong)


@pytest.mark.parametrize("method", IMAGES_ONLY)
def test_prompts_of_images_are_refused_for_words(method: str) -> None:
    with pytest.raises(ConfigError, match=r"visual prompts need an image encoder.*reads input_ids, not images"):
        adapted("decoder", method)


def test_tokens_of_a_vocabulary_are_no_part_of_an_image_model() -> None:
    with pytest.raises(ConfigError, match="peft cannot attach TrainableTokensConfig"):
        adapt(build("timm-vit"), peft=peft.TrainableTokensConfig(token_indices=[1]))


def test_prompts_of_words_are_refused_for_images() -> None:
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="PromptTuningConfig puts prompts before the words"):
        adapt(build("timm-vit"), peft=prompts)


def snapshot(model: nn.Module) -> tuple[dict[str, type], dict[str, Tensor], list[bool]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {n: type(m) for n, m in model.named_modules()}, state, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PREFIX_TUNING cannot be folded"),
        # The queries have a bias, which is changed before the head turns out to have none.
        (peft.BeftConfig(target_modules=["q_proj", "lm_head"]), "BEFT cannot be folded into this model: .*no bias"),
        (peft.LilyConfig(r=4, target_modules=["q_proj"]), "LILY cannot be folded into this model: .*not supported"),
    ],
    ids=["prefix_tuning", "beft", "lily"],
)
def test_methods_that_cannot_fold(method: peft.PeftConfig, reason: str, tmp_path: Path) -> None:
    model = adapt(decoder(attention_bias=True), peft=method)
    train(model, "decoder")
    expected = values(model, "decoder")
    assert not torch.allclose(expected, values(decoder(attention_bias=True), "decoder"), atol=1e-4)
    save_adapter(model, tmp_path)
    loaded = load_adapter(decoder(attention_bias=True), tmp_path)
    before = snapshot(loaded)
    with pytest.raises(ConfigError, match=rf"{reason}.*unfolded|{reason}.*as load_adapter"):
        fold_adapter(loaded)
    modules, state, flags = snapshot(loaded)
    assert (modules, flags) == (before[0], before[2])
    assert state.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][name]) for name, value in state.items())
    torch.testing.assert_close(values(loaded, "decoder"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [peft.LoraConfig(init_lora_weights=False, target_modules=["qkv"]), BottleneckConfig(width=4)]
)
def test_layers_in_a_plain_module_fold_too(method: peft.PeftConfig) -> None:
    """As load_published_checkpoint puts them there."""
    model = peft.inject_adapter_in_model(method, build("timm-vit"))
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = values(model, "timm")
    assert (expected - values(MODELS["timm"](), "timm")).abs().max() > 0.01
    assert fold_adapter(model) is model
    torch.testing.assert_close(values(model, "timm"), expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())

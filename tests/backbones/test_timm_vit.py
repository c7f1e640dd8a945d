"""timm's plain VisionTransformer: wrapped, run in every way a user may run it, and unwrapped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra import PyraConfig, UnsupportedModelError, unwrap, wrap
from pyra.backbones import wrapped_config, wrapped_schedule
from pyra.backbones.timm_vit import MergingBlock
from pyra.errors import ScheduleError

SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
SCHEDULE = [0, 8, 0, 5]
TRAINED_SCHEDULE = [0, 8, 5, 0]  # what the last block merges does not reach a class token, nor its gradient
DOUBLES_SCHEDULE = [20, 0, 9, 0]  # whichever equal pairs go first, every step finds this many equal pairs
KINDS: dict[str, Callable[..., nn.Module]] = {
    "class_token": lambda **kw: tiny(**kw),
    "average_without_class_token": lambda **kw: tiny(class_token=False, global_pool="avg", **kw),
    "average_with_class_token": lambda **kw: tiny(global_pool="avg", **kw),
    "distilled": lambda **kw: tiny("deit_tiny_distilled_patch16_224", **kw),
    "registers": lambda **kw: tiny("vit_small_patch14_reg4_dinov2", **kw),
    "attention_pool": lambda **kw: tiny("vit_base_patch16_siglip_224", **kw),
    "key_norm": lambda **kw: tiny(qk_norm=True, **kw),
}


def tiny(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZE, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's fresh class tokens and biases are (almost) zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def train_reactivation(model: nn.Module) -> nn.Module:
    """Random re-activation weights, so that they matter."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "reactivation" in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> nn.Module:
    return KINDS[kind]()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks of all fused attention calls, in order."""
    seen: list[Tensor | None] = []
    attend = F.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def nodes(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    graph = torch.export.export(model, (images,)).graph
    return [(node.op, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("config", [PyraConfig(schedule=[0] * 4), PyraConfig(rate=0.0)], ids=["schedule", "rate"])
def test_nothing_to_merge_leaves_the_model_alone(
    config: PyraConfig, model: nn.Module, images: Tensor, masks: list[Tensor | None]
) -> None:
    blocks, expected = list(model.blocks), outputs(model, images)
    assert wrap(model, config) is model
    assert all(own is block for own, block in zip(model.blocks, blocks, strict=True))
    assert torch.equal(outputs(model, images), expected)
    assert len(masks) >= 8 and all(mask is None for mask in masks)
    assert wrapped_schedule(model) == [0] * 4
    assert unwrap(model) is model and wrapped_config(model) is None


def test_nothing_to_merge_traces_the_same_graph(images: Tensor) -> None:
    plain, wrapped = tiny(depth=1), wrap(tiny(depth=1), PyraConfig(rate=0.0))
    graph = nodes(plain, images)
    assert nodes(wrapped, images) == graph
    assert nodes(wrap(wrapped, PyraConfig(schedule=[8])), images) != graph


def test_no_mask_until_something_merged(model: nn.Module, images: Tensor, masks: list[Tensor | None]) -> None:
    tokens = 64 + model.num_prefix_tokens
    wrap(model, PyraConfig(schedule=[0, 8, 0, 5]))
    assert outputs(model, images).shape == (3, 10)
    assert masks[0] is None and masks[1] is None
    for mask in masks[2:4]:
        assert mask is not None and mask.shape == (3, 1, 1, tokens - 8)
        torch.testing.assert_close(mask.exp().sum(dim=(1, 2, 3)), torch.full((3,), float(tokens)))
    assert all(mask is None for mask in masks[4:])  # attention pooling sees every token again


def test_no_mask_without_proportional_attention(images: Tensor, masks: list[Tensor | None]) -> None:
    outputs(wrap(tiny(), PyraConfig(schedule=SCHEDULE, proportional_attention=False)), images)
    assert masks == [None] * 4


@pytest.mark.parametrize("reactivation", [True, False])
def test_names_and_structure(model: nn.Module, reactivation: bool) -> None:
    state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wrap(model, PyraConfig(schedule=SCHEDULE, reactivation=reactivation))
    added = [name for name, _ in model.named_parameters() if name not in names]
    assert [name for name, _ in model.named_parameters() if name in names] == names
    kept = model.state_dict()
    assert all(kept[key].data_ptr() == value.data_ptr() for key, value in state.items())
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == targets
    expected = [
        f"blocks.{block}.reactivation.{name}"
        for block in (1, 3)
        for name in ("pair_weight", "channel_weight", "norm.weight", "norm.bias")
    ]
    assert added == (expected if reactivation else [])
    assert "removed=8" in repr(model.blocks[1])
    assert not isinstance(model.blocks[0], MergingBlock)


def test_unwrap_restores_the_model(model: nn.Module, images: Tensor) -> None:
    blocks, names, expected = list(model.blocks), list(model.state_dict()), outputs(model, images)
    wrap(model, PyraConfig(schedule=SCHEDULE))
    assert not torch.equal(outputs(model, images), expected)
    unwrap(model)
    assert all(own is block for own, block in zip(model.blocks, blocks, strict=True))
    assert list(model.state_dict()) == names and wrapped_config(model) is None and wrapped_schedule(model) is None
    assert torch.equal(outputs(model, images), expected)
    assert unwrap(model) is model  # nothing more to undo


@pytest.mark.parametrize("training", [True, False])
def test_unwrap_follows_the_mode_the_model_is_in(training: bool) -> None:
    model = wrap(tiny().train(not training), PyraConfig(schedule=SCHEDULE))
    model.train(training)
    unwrap(model)
    assert {name for name, module in model.named_modules() if module.training != training} == set()


def test_unwrap_keeps_what_was_trained(images: Tensor) -> None:
    model = wrap(tiny(), PyraConfig(schedule=SCHEDULE))
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(2)
    model.blocks[3].mlp.fc2 = nn.Identity()
    model.blocks[3].mlp.fc1 = nn.Identity()
    model.blocks[2].mlp = nn.Identity()
    weight = model.blocks[1].mlp.fc1.weight
    unwrap(model)
    assert model.blocks[1].mlp.fc1.weight is weight
    assert isinstance(model.blocks[2].mlp, nn.Identity) and isinstance(model.blocks[3].mlp.fc1, nn.Identity)
    assert outputs(model, images).isfinite().all()


def test_wrapping_again(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=SCHEDULE)))
    blocks, expected = list(model.blocks), outputs(model, images)
    assert wrap(model, PyraConfig(schedule=list(SCHEDULE))) is model
    assert list(model.blocks) == blocks and torch.equal(outputs(model, images), expected)

    other = PyraConfig(schedule=[7, 0, 0, 0], reactivation=False, order="sequence")
    wrap(model, other)
    assert wrapped_config(model) == other and wrapped_schedule(model) == [7, 0, 0, 0]
    assert torch.equal(outputs(model, images), outputs(wrap(tiny(), other), images))
    assert type(model.blocks[0].replaced[0]) is timm.models.vision_transformer.Block  # not a stand-in's stand-in


def test_a_schedule_that_does_not_fit_leaves_the_model_alone(images: Tensor) -> None:
    model = wrap(tiny(), PyraConfig(schedule=SCHEDULE))
    expected = outputs(model, images)
    with pytest.raises(ScheduleError, match=r"3 entries.*block 1 removes 40 of 65 tokens: at most 32"):
        wrap(model, PyraConfig(schedule=[0, 40, 0]))
    assert wrapped_schedule(model) == SCHEDULE and torch.equal(outputs(model, images), expected)


def test_copy_and_pickle(model: nn.Module, images: Tensor) -> None:
    train_reactivation(wrap(model, PyraConfig(schedule=SCHEDULE)))
    expected = outputs(model, images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, images), expected)
        assert wrapped_config(other) == wrapped_config(model)
        with torch.no_grad():
            other.blocks[1].attn.qkv.weight.zero_()
        assert torch.equal(outputs(model, images), expected)
        unwrap(other)
        assert not any(isinstance(block, MergingBlock) for block in other.blocks)
        assert not other.blocks[1].attn.qkv.weight.any()  # the original block's children were copied with it
    assert wrapped_schedule(model) == SCHEDULE


def test_state_dict_round_trip(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=SCHEDULE)))
    other = wrap(timm.create_model("vit_tiny_patch16_224", **SIZE).eval(), PyraConfig(schedule=SCHEDULE))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, images), outputs(model, images))


@pytest.mark.parametrize("order", ["grouped", "sequence"])
def test_results_do_not_depend_on_the_batch(model: nn.Module, images: Tensor, order: str) -> None:
    train_reactivation(wrap(model, PyraConfig(schedule=SCHEDULE, order=order)))
    together = outputs(model, images)
    torch.testing.assert_close(torch.cat([outputs(model, image[None]) for image in images]), together)


def test_an_empty_batch(model: nn.Module, images: Tensor) -> None:
    assert outputs(model, images[:0]).shape == (0, 10)
    assert outputs(wrap(model, PyraConfig(schedule=SCHEDULE)), images[:0]).shape == (0, 10)


def test_interleaved_forwards(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=SCHEDULE)))
    other = torch.randn(2, 3, 32, 32)
    expected, expected_other = outputs(model, images), outputs(model, other)
    inner: list[Tensor] = []

    def run_another(*_: object) -> None:
        if not inner:
            inner.append(torch.empty(0))  # the hook also runs in the inner forward
            inner[0] = model(other)

    for module in (model.blocks[2], model.blocks[1].attn.proj):  # between two blocks, and inside one's attention
        handle = module.register_forward_hook(run_another)
        assert torch.equal(outputs(model, images), expected)
        assert torch.equal(inner.pop(), expected_other)
        handle.remove()


def test_interleaved_backwards(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=SCHEDULE)))
    model.set_grad_checkpointing(True)
    model.train()
    other = torch.randn(2, 3, 32, 32)

    def gradients(*losses: Tensor) -> list[Tensor]:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    first = gradients(model(images).square().sum())
    second = gradients(model(other).square().sum())
    one, two = model(images).square().sum(), model(other).square().sum()  # both recompute after the other's forward
    for both, a, b in zip(gradients(one, two), first, second, strict=True):
        torch.testing.assert_close(both, a + b)


def test_hooks_keep_running(images: Tensor) -> None:
    model, called = tiny(), []
    for name in ("norm1", "attn", "attn.qkv", "attn.k_norm", "mlp"):
        module = model.get_submodule(f"blocks.1.{name}")
        module.register_forward_pre_hook(lambda *_, name=name: called.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: called.append(f"after {name}"))
    outputs(model, images)
    expected, called[:] = list(called), []
    outputs(wrap(model, PyraConfig(schedule=SCHEDULE)), images)
    assert called == expected


def test_a_new_head_with_another_pooling(images: Tensor) -> None:
    config = PyraConfig(schedule=SCHEDULE)
    before, after = wrap(tiny(), config), tiny()
    for model in (before, after):
        torch.manual_seed(4)
        model.reset_classifier(10, "avg")
    torch.testing.assert_close(outputs(before, images), outputs(wrap(after, config), images))


def test_threads(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=SCHEDULE)))
    batches = [torch.randn(1 + index % 3, 3, 32, 32) for index in range(16)]
    expected = [outputs(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda batch: outputs(model, batch), batches))
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_gradient_checkpointing(model: nn.Module, images: Tensor) -> None:
    train_reactivation(wrap(model, PyraConfig(schedule=TRAINED_SCHEDULE))).train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        result = model(images)
        (result[0] + result[1] if isinstance(result, tuple) else result).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {name for name, _ in model.named_parameters()}
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name
        assert value.any(), name


def test_compiles_in_one_graph(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(depth=3), PyraConfig(schedule=[0, 8, 5])))
    expected = outputs(model, images)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, images), expected)


def test_exports_with_a_free_batch_size(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(global_pool="avg", depth=2), PyraConfig(schedule=[8, 5])))
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (images[:2], torch.cat([images, images])):
        torch.testing.assert_close(outputs(program, batch), outputs(model, batch))


def two_kinds_of_patches() -> Tensor:
    """Images whose left and right half repeat one patch each: every merged pair is of identical tokens."""
    patches = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    halves = [patches[:, :, side].repeat(1, 1, 8, 4) for side in range(2)]
    return torch.cat(halves, dim=3)


@pytest.mark.parametrize("order", ["grouped", "sequence"])
def test_merging_identical_tokens_changes_nothing(kind: str, order: str) -> None:
    model, images = KINDS[kind](), two_kinds_of_patches()
    nn.init.zeros_(model.pos_embed)
    expected = outputs(model, images)
    wrap(model, PyraConfig(schedule=DOUBLES_SCHEDULE, reactivation=False, order=order))
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)

    wrap(model, PyraConfig(schedule=DOUBLES_SCHEDULE, reactivation=False, order=order, proportional_attention=False))
    if model.num_prefix_tokens:  # with patches of two kinds half and half, plain attention sees the wrong shares
        assert not torch.allclose(outputs(model, images), expected, rtol=1e-3, atol=1e-3)


def test_autocast_is_as_exact_as_the_plain_model() -> None:
    model, images = tiny(), two_kinds_of_patches()
    nn.init.zeros_(model.pos_embed)
    exact = outputs(model, images)

    def error() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = outputs(model, images)
        assert result.dtype == torch.bfloat16
        return float((result.float() - exact).abs().max())

    plain = error()
    wrap(model, PyraConfig(schedule=DOUBLES_SCHEDULE))
    assert 0 < error() <= 2 * plain + torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


def test_trains_under_autocast(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=TRAINED_SCHEDULE))).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(images).float(), torch.tensor([1, 2, 3]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, images: Tensor) -> None:
    model = train_reactivation(wrap(tiny().to(dtype), PyraConfig(schedule=SCHEDULE)))
    assert model.blocks[1].reactivation.pair_weight.dtype == dtype
    result = outputs(model, images.to(dtype))
    assert result.dtype == dtype and result.isfinite().all()


def test_another_input_size() -> None:
    model = train_reactivation(wrap(tiny(dynamic_img_size=True), PyraConfig(schedule=[0, 8, 0, 5])))
    assert outputs(model, torch.randn(2, 3, 48, 40)).shape == (2, 10)
    with pytest.raises(ScheduleError, match="layer 3 removes 5 of the 9 tokens of this input: at most 4 can go"):
        outputs(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(ScheduleError, match="layer 1 removes 8 of the 10 tokens of this input: at most 4 can go"):
        outputs(model, torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "relative position bias"),
        ("swinv2_tiny_window8_256", "relative position bias|windows"),
        ("beit_base_patch16_224", "relative position bias"),
        ("vit_relpos_small_patch16_224", "relative position bias"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("convnext_atto", "ConvNeXt is not timm's plain VisionTransformer"),
        ("samvit_base_patch16", "relative position bias|windows"),
        ("resnet18", "ResNet is not timm's plain VisionTransformer"),
    ],
)
def test_unsupported(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be merged: .*({reason})"):
        wrap(model, PyraConfig(rate=0.5))
    assert list(model.state_dict()) == before and wrapped_config(model) is None


def test_unsupported_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="ResPostBlock"):
        wrap(tiny(block_fn=timm.models.vision_transformer.ResPostBlock), PyraConfig(schedule=SCHEDULE))


def test_not_a_backbone() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is of no supported family; supported are plain vision"):
        wrap(nn.Linear(2, 2), PyraConfig(rate=0.5))


@pytest.mark.parametrize("target", ["qkv", "all-linear"])
def test_peft_before_or_after_wrapping(target: str, images: Tensor) -> None:
    config = PyraConfig(schedule=SCHEDULE, reactivation=False)
    lora = peft.LoraConfig(r=2, target_modules=[target] if target == "qkv" else target, init_lora_weights=False)
    torch.manual_seed(3)
    before = peft.get_peft_model(tiny(), lora)
    torch.manual_seed(3)
    after = peft.get_peft_model(wrap(tiny(), config), lora)
    plain = outputs(before, images)
    assert wrap(before, config) is before and wrapped_config(before) == config
    assert list(before.state_dict()) == list(after.state_dict())
    assert torch.equal(outputs(before, images), outputs(after, images))
    assert not torch.equal(outputs(before, images), plain)
    assert torch.equal(outputs(unwrap(before), images), plain)


def test_intermediate_maps_are_unmerged_and_in_place(model: nn.Module, images: Tensor) -> None:
    """Every map is full-length; where nothing merged yet it is the plain model's, later each patch has its group's."""
    plain = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    wrap(model, PyraConfig(schedule=SCHEDULE))
    expected = model.forward_features(images)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        last, maps = copied.forward_intermediates(images, output_fmt="NLC", norm=True)
        raw = copied.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        grids = copied.forward_intermediates(images, intermediates_only=True)
        assert [m.shape for m in raw] == [m.shape for m in plain]
        assert torch.equal(raw[0], plain[0]) and not torch.equal(raw[1], plain[1])
        assert torch.equal(last, expected) and torch.equal(maps[-1], expected[:, model.num_prefix_tokens :])
        for grid, tokens in zip(grids, raw, strict=True):
            assert torch.equal(grid.flatten(2).transpose(1, 2), tokens)
    # Fewer blocks, prefix tokens, and checkpointed blocks give the same.
    early = model.forward_intermediates(images, indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(early[0], raw[1])
    assert torch.equal(model.get_intermediate_layers(images, n=[1])[0], raw[1])
    unwrap(model)
    after = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))


def test_groups_of_an_intermediate_map_are_those_that_merged(images: Tensor) -> None:
    model = wrap(tiny(), PyraConfig(schedule=[0, 8, 0, 0], reactivation=False))
    first, second, *_ = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for before, after in zip(first, second, strict=True):
        assert len(before.unique(dim=0)) == 64 and len(after.unique(dim=0)) == 56


def test_gradients_through_checkpointed_intermediate_maps(images: Tensor) -> None:
    model = train_reactivation(wrap(tiny(), PyraConfig(schedule=TRAINED_SCHEDULE))).train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        maps = model.forward_intermediates(images, intermediates_only=True)
        sum(m.square().sum() for m in maps).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_mask_is_refused(images: Tensor) -> None:
    model = wrap(tiny(), PyraConfig(schedule=SCHEDULE))
    with pytest.raises(UnsupportedModelError, match="no attention mask"):
        model(images, attn_mask=torch.zeros(65, 65))

"""Every family, run in every way a user may run it, gives what it gives eagerly: to 1e-5, or bit for bit."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from backbone_families import FAMILIES, SCHEDULE, build, config, images, result, run, trained
from distributed_worker import BATCH, parameters, step, wrapped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyra import step as merging_step
from pyra import token_features, unwrap, wrap
from pyra.backbones import geometry, locate, macs, wrapped_config
from pyra.backbones.features import source_maps
from pyra.backbones.layers import MergingLayer, merging_layers
from pyra.errors import ScheduleError, UnsupportedModelError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WORKER = Path(__file__).parent.parent / "support" / "distributed_worker.py"


def merging(family: str, **options: Any) -> nn.Module:
    """The family's tiny model, merging, with re-activation weights that matter."""
    return trained(wrap(build(family, **options), config()))


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


def gradients(model: nn.Module, inputs: dict[str, Tensor], forward: nn.Module | None = None) -> dict[str, Tensor]:
    """Gradients of the mean square of the results; a compiled ``forward`` may run in the model's place."""
    model.zero_grad()
    result(run(model if forward is None else forward, inputs)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}")


def core_inputs(family: str, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the image encoder itself takes."""
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "input_ids")}
    return inputs["pixel_values"], rest


def eager(family: str) -> None:
    """Merging changes the results, float64 agrees, and a sample does not depend on its batch."""
    inputs, model = FAMILIES[family].inputs(), merging(family)
    merged = values(model, inputs)
    assert merged.isfinite().all()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    torch.testing.assert_close(values(merging(family).double(), doubled).float(), merged, rtol=1e-4, atol=1e-5)
    alone = {k: v[:2] if len(v) == 3 else v for k, v in inputs.items()}
    torch.testing.assert_close(values(model, alone), merged[:2], **CLOSE)
    assert not torch.allclose(values(unwrap(model), inputs), merged, rtol=1e-3, atol=1e-4)


def batch_of_one(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(), merging(family)
    one = {k: v[1:2] if len(v) == 3 else v for k, v in inputs.items()}
    torch.testing.assert_close(values(model, one), values(model, inputs)[1:2], **CLOSE)


BATCHES = (3, 3, 2, 5, 1)


def compiled(family: str, backend: str = "aot_eager") -> None:
    """One graph without breaks at one shape, one more for other batches, one for a batch of one."""
    model, make = merging(family), FAMILIES[family].inputs
    eager_values = [values(model, make(batch)) for batch in BATCHES]
    _or_skip_where_the_plain_model_fails(family, lambda: values(_afresh(model)[0], make(BATCHES[0])))
    fast, counter = _afresh(model, backend)
    graphs = []
    for batch, expected in zip(BATCHES, eager_values, strict=True):
        torch.testing.assert_close(values(fast, make(batch)), expected, **CLOSE)
        graphs.append(counter.frame_count)
    if graphs[:2] != [1, 1] or graphs[3] > 2 or graphs[4] > 3:  # SigLIP 2 itself has a loop over the batch
        plain, counter = _afresh(build(family))
        assert graphs == [(values(plain, make(batch)), counter.frame_count)[1] for batch in BATCHES]


def _afresh(model: nn.Module, backend: str = "eager", fullgraph: bool = True) -> tuple[Any, Any]:
    """A compiled model that nothing compiled so far counts for, and the counter of its graphs."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=fullgraph, backend=counter), counter


def compiled_plainly(family: str) -> None:
    """Without `fullgraph`, with gradients off and on, and under autocast: one graph a mode, as the plain model."""
    inputs, model = FAMILIES[family].inputs(), merging(family)
    expected = values(model, inputs)
    fast, counter = _afresh(model, "aot_eager", fullgraph=False)
    first = _or_skip_where_the_plain_model_fails(family, lambda: values(fast, inputs))
    torch.testing.assert_close(first, expected, **CLOSE)
    torch.testing.assert_close(result(run(fast, inputs)).detach(), expected, **CLOSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered, expected = values(fast, inputs), values(model, inputs)
    assert lowered.isfinite().all() and lowered.dtype == expected.dtype
    graphs = counter.frame_count
    if graphs != 3:  # SigLIP 2 itself breaks its graph
        plain, counter = _afresh(build(family), "aot_eager", fullgraph=False)
        values(plain, inputs), run(plain, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values(plain, inputs)
        assert graphs == counter.frame_count


def compiled_backward(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(), merging(family).train()
    expected = gradients(model, inputs)
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    _or_skip_where_the_plain_model_fails(family, lambda: gradients(model, inputs, fast))
    assert_same(gradients(model, inputs, fast), expected)


def exported(family: str) -> None:
    """torch.export with a free batch size."""
    model = merging(family)
    program = _or_skip_where_the_plain_model_fails(family, lambda: _export(model, family), "export")
    for count in (2, 5):
        inputs = FAMILIES[family].inputs(count)
        with torch.no_grad():
            actual = program(*inputs.values()) if family.startswith("timm") else program(**inputs)
        torch.testing.assert_close(result(actual), values(model, inputs), **CLOSE)


def checkpointed(family: str) -> None:
    """The library's own switch for gradient checkpointing, turned on before or after wrapping."""
    inputs, model = FAMILIES[family].inputs(), merging(family).train()
    expected = gradients(model, inputs)
    before = build(family)
    _checkpoint(before)
    for other in (model, trained(wrap(before, config()))):
        _checkpoint(other)
        runs = Counter()
        for layer in merging_layers(other):
            layer.mlp.register_forward_pre_hook(lambda module, _, runs=runs: runs.update([module]))
        assert_same(gradients(other.train(), inputs), expected, rtol=0, atol=0)
        assert list(runs.values()) == [2, 2]  # forward, and again in the backward pass


def autocast_bf16(family: str) -> None:
    """As exact as the plain model, when both precisions merge the same pairs."""
    inputs, plans = FAMILIES[family].inputs(), []
    plain, model = build(family), merging(family)
    find = merging_step.match

    def remember(*args: Any, **kwargs: Any) -> Any:
        plans.append(find(*args, **kwargs))
        return plans[-1]

    def lowered(some: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return values(some, inputs).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_step, "match", remember)
        exact = values(model, inputs)
        assert len(plans) == 2
        patch.setattr(merging_step, "match", lambda *_args, **_kwargs: plans.pop(0))
        error = float((lowered(model) - exact).abs().max())
    limit = float((lowered(plain) - values(plain, inputs)).abs().max())
    assert 0 < error <= 2 * limit + torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # and free to choose its pairs, forward and backward
        changed = gradients(model.train(), inputs)
    assert all(gradient.isfinite().all() for gradient in changed.values())
    assert any(gradient.any() for name, gradient in changed.items() if "reactivation" in name)


def half_precision_weights(family: str) -> None:
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in FAMILIES[family].inputs().items()}
    if "noise" in inputs:
        inputs["noise"] = FAMILIES[family].inputs()["noise"]
    output = values(merging(family).bfloat16(), inputs)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def deepcopied(family: str) -> None:
    _assert_a_copy_of_its_own(family, copy.deepcopy)


def pickled(family: str) -> None:
    _assert_a_copy_of_its_own(family, lambda model: pickle.loads(pickle.dumps(model)))


def state_dict(family: str) -> None:
    """What is trained wrapped loads into a model that is not, and into another that is."""
    inputs, model = FAMILIES[family].inputs(), merging(family)
    plain, other = build(family), wrap(build(family), config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    state = model.state_dict()
    other.load_state_dict(state)
    torch.testing.assert_close(values(other, inputs), values(model, inputs), rtol=0, atol=0)
    plain.load_state_dict({name: value for name, value in state.items() if "reactivation" not in name})
    torch.testing.assert_close(values(plain, inputs), values(unwrap(model), inputs), rtol=0, atol=0)


def interleaved(family: str) -> None:
    """A second forward runs inside the first, between its layers and inside an attention."""
    entry, model = FAMILIES[family], merging(family)
    one, two = entry.inputs(), entry.inputs(2, seed=9)
    expected, expected_inner = values(model, one), values(model, two)
    inner: list[Tensor] = []

    def run_another(*_: object) -> None:
        if not inner:
            inner.append(torch.empty(0))  # the hook also runs in the inner forward
            inner[0] = values(model, two)

    first, last = merging_layers(model)
    for module in (first, last.mlp, first.mlp):
        handle = module.register_forward_hook(run_another)
        assert torch.equal(values(model, one), expected)
        assert torch.equal(inner.pop(), expected_inner)
        handle.remove()


def interleaved_backward(family: str) -> None:
    """Two forwards, then both backwards, each recomputing its layers."""
    entry, model = FAMILIES[family], merging(family).train()
    _checkpoint(model)
    one, two = entry.inputs(), entry.inputs(2, seed=9)
    first, second = gradients(model, one), gradients(model, two)
    model.zero_grad()
    losses = [result(run(model, inputs)).square().mean() for inputs in (one, two)]
    for loss in losses:
        loss.backward()
    both = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(both, {name: first[name] + second[name] for name in first})


def intermediate_maps(family: str) -> None:
    """Full length, in place: equal rows are exactly the merged groups, and what came before merging is unchanged."""
    model, inputs = build(family), FAMILIES[family].inputs()
    plain = _maps(model, inputs)
    trained(wrap(model, config()))
    found, (pixels, rest) = _maps(model, inputs), core_inputs(family, inputs)
    assert [m.shape for m in found] == [m.shape for m in plain]
    groups = source_maps(model, pixels, **rest)
    assert list(groups) == [1, 2]
    for before, after in zip(plain[:-2], found[:-2], strict=True):
        assert torch.equal(before, after)
    for layer, index in zip((1, 2), (-2, -1), strict=True):
        together = groups[layer][:, :, None] == groups[layer][:, None, :]
        tokens = found[index]
        rows = together[:, -tokens.shape[1] :, -tokens.shape[1] :]  # timm leaves the prefix tokens out
        assert torch.equal((tokens[:, :, None] == tokens[:, None]).all(-1), rows)
    assert [int(groups[layer].max()) + 1 for layer in (1, 2)] == [
        geometry(model).tokens - 8,
        geometry(model).tokens - 13,
    ]


def train_mode(family: str) -> None:
    """Without dropout, training gives the results of evaluation, and every re-activation weight a gradient."""
    inputs, model = FAMILIES[family].inputs(), merging(family)
    torch.testing.assert_close(values(model.train(), inputs), values(model.eval(), inputs), **CLOSE)
    found = gradients(model.train(), inputs)
    names = [name for name, _ in model.named_parameters() if "reactivation" in name]
    assert len(names) == 8 and all(name in found for name in names)
    assert all(found[name].any() for name in names if ".1." in name)


def other_sizes(family: str) -> None:
    """Non-square images, and another size than the model was wrapped at, where the model takes them."""
    entry = FAMILIES[family]
    if entry.inputs is not images:
        pytest.skip("this model's inputs are made for one size")
    if family.startswith("hf") and "timm" not in family:
        model, call = merging(family), entry.call
    else:
        shaped = values(merging(family, img_size=(24, 40)), images(2, (24, 40)))
        assert shaped.isfinite().all() and len(shaped) == 2
        model, call = merging(family, **entry.dynamic), {}
    plain = unwrap(copy.deepcopy(model))
    for size in ((24, 48), (40, 40)):
        inputs = images(2, size)
        with torch.no_grad():
            expected, merged = result(run(plain, inputs, **call)), result(run(model, inputs, **call))
        assert merged.shape == expected.shape and merged.isfinite().all()
        assert not torch.equal(merged, expected)
    with pytest.raises(ScheduleError, match=r"layer 1 removes 8 of the \d+ tokens of this input: at most \d can go"):
        run(model, images(2, (8, 20)), **call)


def rate_zero(family: str) -> None:
    """Nothing to merge: the very same modules run, and the results are the same bits."""
    inputs, model = FAMILIES[family].inputs(), build(family)
    expected, modules = values(model, inputs), list(model.modules())
    wrap(model, config(schedule=None, rate=0.0))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(values(model, inputs), expected)


def unwrapped(family: str) -> None:
    """Bit for bit what it was, with the very same modules, hooks and names."""
    inputs, model = FAMILIES[family].inputs(), build(family)
    called: list[int] = []
    list(locate(model)[0].layers(locate(model)[1]))[-1].register_forward_hook(lambda *_: called.append(1))
    expected, state = values(model, inputs), list(model.state_dict())
    modules = list(model.modules())
    wrap(model, config())
    values(model, inputs)
    assert wrapped_config(model) == config() and len(called) == 2
    assert unwrap(model) is model and wrapped_config(model) is None
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == state and len(called) == 2
    assert torch.equal(values(model, inputs), expected)
    assert all(torch.equal(a, b) for a, b in zip(_maps(model, inputs), _maps(build(family), inputs), strict=True))
    assert unwrap(model) is model


def parameter_names(family: str) -> None:
    """Only `reactivation` modules are new; every old tensor keeps its name and memory."""
    model = build(family)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wrap(model, config())
    after = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert {name: after[name] for name in before} == before
    added = after.keys() - before.keys()
    assert len(added) == 8 and all(".reactivation." in name for name in added)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == linear
    assert [layer.step.removed for layer in merging_layers(model)] == SCHEDULE[1:]


def dense(family: str) -> None:
    """Token maps: full length in place, merged with sizes, gradients, and the same through a source map."""
    model = merging(family)
    pixels, rest = core_inputs(family, FAMILIES[family].inputs())
    full = token_features(model, pixels, dense=True, **rest)
    mapped = token_features(model, pixels, dense=True, source_map=True, **rest)
    merged = token_features(model, pixels, source_map=True, **rest)
    sizes = geometry(model)
    assert full.tokens.shape == (3, sizes.tokens, sizes.dim) and full.source_map is None
    assert full.patches.shape[1] == sizes.tokens - sizes.prefix_tokens
    assert merged.tokens.shape == (3, sizes.tokens - 13, sizes.dim)
    assert torch.equal(full.tokens, mapped.tokens)
    assert torch.equal(merged.tokens.take_along_dim(merged.source_map[..., None], 1), full.tokens)
    counts = torch.stack([torch.bincount(row, minlength=merged.tokens.shape[1]) for row in merged.source_map])
    if "pixel_attention_mask" not in rest:
        assert torch.equal(merged.size[..., 0], counts)
    assert int(merged.size.sum()) == int(rest.get("pixel_attention_mask", torch.ones(3, sizes.tokens)).sum())
    before = len(list(model.modules()))
    full.tokens.square().sum().backward()
    assert any(p.grad.any() for name, p in model.named_parameters() if "reactivation.pair" in name)
    assert len(list(model.modules())) == before
    plain = token_features(unwrap(model), pixels, source_map=True, **rest)
    assert torch.equal(plain.source_map[0], torch.arange(sizes.tokens)) and not torch.equal(plain.tokens, full.tokens)


def counted_macs(family: str) -> None:
    """The MACs we promise are torch's own count, to 1 %, plain and merged."""
    if FAMILIES[family].inputs not in (images,):
        pytest.skip("the count would include a text tower, a second mask, or leave out masked patches")
    model, inputs = _wide(family).requires_grad_(False), FAMILIES[family].inputs(1)
    for schedule in (None, SCHEDULE, [20, 10, 10]):
        if schedule is not None:
            wrap(model, config(schedule=schedule, reactivation=False))
        # The fused kernel of CPUs is unknown to the counter.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run(model, inputs)
        assert counter.get_total_flops() / 2 == pytest.approx(macs(model), rel=0.01)


def not_a_number(family: str) -> None:
    """NaN and infinite inputs spoil their own sample's results, and nothing else."""
    inputs, model = FAMILIES[family].inputs(), merging(family)
    expected = values(model, inputs)
    for poison in (math.nan, math.inf, -math.inf):
        bad = {k: v.clone() for k, v in inputs.items()}
        bad["pixel_values"][1] = poison
        found = values(model, bad)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
        assert not found[1].isfinite().all()


def wrapped_again(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(), merging(family)
    expected = values(model, inputs)
    assert wrap(model, config()) is model and torch.equal(values(model, inputs), expected)
    other = config(schedule=[5, 0, 0], reactivation=False)
    wrap(model, other)
    assert torch.equal(values(model, inputs), values(wrap(build(family), other), inputs))
    assert not any(isinstance(layer.replaced[0], MergingLayer) for layer in merging_layers(model))
    with pytest.raises(ScheduleError, match="block 0 removes 60"):
        wrap(model, config(schedule=[60, 0, 0]))
    assert wrapped_config(model) == other


def ddp(family: str, folder: Path) -> None:
    _assert_one_step_of_two_processes(family, folder, "ddp")


def fsdp2(family: str, folder: Path) -> None:
    _assert_one_step_of_two_processes(family, folder, "fsdp2")


QUICK: tuple[Callable[..., None], ...] = (
    eager,
    batch_of_one,
    checkpointed,
    autocast_bf16,
    half_precision_weights,
    deepcopied,
    pickled,
    state_dict,
    interleaved,
    interleaved_backward,
    intermediate_maps,
    train_mode,
    other_sizes,
    rate_zero,
    unwrapped,
    parameter_names,
    dense,
    counted_macs,
    not_a_number,
    wrapped_again,
)
TRACED = (compiled, compiled_plainly, compiled_backward, exported)
# One of timm and one of transformers, with and without rotary positions; each takes half a minute to trace.
TRACED_QUICKLY = ("timm-vit", "hf-dinov3")
traced_families = [
    pytest.param(name, marks=() if name in TRACED_QUICKLY else pytest.mark.slow, id=name) for name in FAMILIES
]


@pytest.mark.parametrize("way", QUICK, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix(family: str, way: Callable[[str], None]) -> None:
    way(family)


@pytest.mark.parametrize("way", TRACED, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", traced_families)
def test_matrix_traced(family: str, way: Callable[[str], None]) -> None:
    way(family)


@pytest.mark.slow  # the C++ compiler runs for each of them
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_inductor(family: str) -> None:
    compiled(family, backend="inductor")


@pytest.mark.slow  # two processes start, and compute every family
@pytest.mark.parametrize("way", [ddp, fsdp2], ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_distributed(family: str, way: Callable[[str, Path], None], two_processes: Path) -> None:
    way(family, two_processes)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes computed for every family: run once, by the first pytest process that asks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        limit = time.monotonic() + 300
        while not done.exists() and time.monotonic() < limit:
            time.sleep(0.2)
        return folder
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [*command, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    (folder / "log.txt").write_text(outcome.stdout + outcome.stderr)
    done.touch()
    return folder


def test_reentrant_checkpointing_is_refused() -> None:
    model = merging("hf-vit").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        run(model, images())
    assert values(model.eval(), images()).isfinite().all()


def _assert_one_step_of_two_processes(family: str, folder: Path, way: str) -> None:
    stored = folder / f"{family}.{way}.pt"
    assert stored.exists(), (folder / "log.txt").read_text()[-2000:]
    found = torch.load(stored, weights_only=True)
    assert "error" not in found, found["error"]
    model = wrapped(family)
    before = parameters(model)
    step(model, FAMILIES[family].inputs(BATCH))
    expected = parameters(model)
    assert_same(found, expected)
    assert any(not torch.equal(before[name], expected[name]) for name in expected if "pair_weight" in name)


def _assert_a_copy_of_its_own(family: str, copy_of: Callable[[nn.Module], nn.Module]) -> None:
    inputs, model = FAMILIES[family].inputs(), merging(family)
    expected, maps = values(model, inputs), _maps(model, inputs)
    for hook_holder in model.modules():  # transformers' recorders are local functions, which pickle refuses
        for key in [k for k, hook in hook_holder._forward_hooks.items() if "<locals>" in hook.__qualname__]:
            del hook_holder._forward_hooks[key]
        hook_holder.__dict__.pop("_output_capturing_hooks_installed", None)
    other = copy_of(model)
    assert torch.equal(values(other, inputs), expected) and wrapped_config(other) == config()
    assert all(torch.equal(a, b) for a, b in zip(_maps(other, inputs), maps, strict=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(values(model, inputs), expected)
    unwrap(other)
    assert not any(True for _ in merging_layers(other)) and not any(p.any() for p in other.parameters())
    assert len(list(merging_layers(model))) == 2


def _maps(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The model's own maps after each layer, [B, N, C] each."""
    _, core = locate(model)
    with torch.no_grad():
        if hasattr(core, "forward_intermediates"):
            return core.forward_intermediates(inputs["pixel_values"], output_fmt="NLC", intermediates_only=True)
        pixels, rest = core_inputs("", inputs)
        return list(core(pixels, output_hidden_states=True, **rest).hidden_states)


def _checkpoint(model: nn.Module) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.activation_checkpointing_enable()


def _wide(family: str) -> nn.Module:
    """A model wide enough that what the count leaves out (heads, matching) is small beside the rest."""
    if family.startswith("hf") and "timm" not in family:
        return build(family, hidden_size=192, intermediate_size=768)
    return build(family, embed_dim=192, mlp_ratio=4)


def _export(model: nn.Module, family: str) -> nn.Module:
    inputs, batch = FAMILIES[family].inputs(3), torch.export.Dim("batch", min=2, max=16)
    free = {name: {0: batch} if len(value) == 3 else None for name, value in inputs.items()}
    if family.startswith("timm"):
        return torch.export.export(model, tuple(inputs.values()), dynamic_shapes=tuple(free.values())).module()
    return torch.export.export(model, (), inputs, dynamic_shapes=free).module()


def _or_skip_where_the_plain_model_fails(family: str, attempt: Callable[[], Any], way: str = "compile") -> Any:
    try:
        return attempt()
    except Exception as error:
        plain, inputs = build(family), FAMILIES[family].inputs()
        try:
            if way == "export":
                _export(plain, family)
            else:
                torch.compiler.reset()
                values(torch.compile(plain, fullgraph=True, backend="eager"), inputs)
        except Exception:
            pytest.skip(f"{type(plain).__name__} itself does not {way}: {str(error).splitlines()[0][:120]}")
        raise

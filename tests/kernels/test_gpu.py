"""What only a GPU can tell: real sizes, many repeats, races, graphs, and which kernels of attention run.

Everything here runs on the device of ``PYRA_TEST_DEVICE`` (``cuda`` by default).
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyra import PyraConfig, wrap
from pyra.attention import proportional
from pyra.kernels import backend, checks, match, merge
from pyra.kernels.choice import runs_triton
from pyra.kernels.match import Rules
from pyra.kernels.merge import Plan

DEVICE = torch.device(os.environ.get("PYRA_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.gpu
RULES = Rules("grouped", "bipartite", 0.5, None, 1)
# tokens, prefix, heads, head channels, pairs: ViT-B and ViT-L at 224 and 384, DINOv2-S at 224 and 518, SigLIP-So400m
LAYERS = [(197, 1, 12, 64, 40), (577, 1, 12, 64, 117), (197, 1, 16, 64, 20), (577, 1, 16, 64, 58)]
LAYERS += [(257, 1, 6, 64, 52), (1370, 1, 6, 64, 280), (729, 0, 16, 72, 150)]
HALVES = (torch.bfloat16, torch.float16)


def test_the_check_passes_so_auto_takes_the_kernels() -> None:
    assert checks.disagreement(DEVICE) is None
    assert runs_triton(torch.ones(1, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("tokens", "prefix", "heads", "dim", "pairs"), LAYERS)
def test_real_sizes(tokens: int, prefix: int, heads: int, dim: int, pairs: int, dtype: torch.dtype) -> None:
    keys, x, size, weights = checks.drawn(4, tokens, heads, dim, pairs, DEVICE, dtype)
    for removed in (pairs, 0, (tokens - prefix) // 2):
        for order in ("grouped", "sequence"):
            assert checks.match_problems(keys, removed, prefix, RULES._replace(order=order)) == []
    plan = Plan(*match.reference(keys, 1, pairs, prefix, RULES, None)[:4], None)
    for sizes in (size, None):
        for trained in (weights, None):
            assert checks.merge_problems(x, sizes, plan, trained, backward=True) == []
    assert checks.follow_problems(size, plan, dtype) == []
    if dtype != torch.float32:
        assert checks.attend_problems(keys, size) == []


@pytest.mark.parametrize("batch", [1, 256])
def test_many_runs_are_one(batch: int) -> None:
    keys, x, size, weights = checks.drawn(batch, 197, 12, 64, 40, DEVICE, torch.bfloat16)
    plan = Plan(*match.reference(keys, 1, 40, 1, RULES, None)[:4], None)
    gradient = torch.randn(batch, 157, 768, device=DEVICE, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        merged, total = torch.ops.pyra.merge_tokens(x, size, *plan, *weights, "triton")
        inputs = (gradient, total, x, size, *plan, *weights, "triton")
        return [
            *match.match(keys, 1, 40, 1, RULES, backend="triton"),
            merged,
            *torch.ops.pyra.merge_tokens_backward(*inputs),
        ]

    first = run()
    for _ in range(50):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


def test_addresses_beyond_31_bits() -> None:
    """More than 2**31 elements: the last samples must come out as they do alone."""
    batch = 2**31 // (577 * 1024) + 3
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.randn(batch, 577, 1024, device=DEVICE, dtype=torch.bfloat16)
    keys = x.view(batch, 577, 16, 64).transpose(1, 2)
    with backend("triton"):
        found = match.match(keys, 1, 58, 1, RULES)
        merged, _ = merge.merge(x, None, Plan(*found[:4], None))
        last = match.match(keys[-2:], 1, 58, 1, RULES)
        alone, _ = merge.merge(x[-2:], None, Plan(*last[:4], None))
    assert all(torch.equal(all_[-2:], few) for all_, few in zip(found, last, strict=True))
    assert torch.equal(merged[-2:], alone)


def test_in_a_cuda_graph() -> None:
    keys, x, _, weights = checks.drawn(8, 197, 12, 64, 40, DEVICE, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        plan = Plan(*match.match(keys, 1, 40, 1, RULES)[:4], None)
        return torch.ops.pyra.merge_tokens(x, None, *plan, *weights, "auto")

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=10).eval().to(DEVICE)
    return wrap(model, PyraConfig(rate=0.6, **options))  # type: ignore[arg-type]


def test_whole_models_agree() -> None:
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        expected = vit(backend="reference")(images)
        torch.testing.assert_close(vit(backend="triton")(images), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(vit()(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_models_compile_whole(mode: str, dtype: torch.dtype) -> None:
    images, model = torch.randn(4, 3, 224, 224, device=DEVICE, dtype=dtype), vit().to(dtype)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            found = compiled(images).clone()
        expected, single = model(images), vit()(images.float())
    allowed = 2 * (expected.float() - single).norm() if dtype == torch.bfloat16 else 1e-3 * single.norm()
    assert (found.float() - single).norm() <= allowed


def test_models_replay_from_a_cuda_graph() -> None:
    images, model = torch.randn(4, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16), vit().bfloat16()
    with torch.no_grad():
        expected = model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(images)
        graph.replay()
    # Not to the bit: while a graph is captured, cuBLAS may choose other algorithms.
    assert (found - expected).norm() <= 2e-2 * expected.norm()


def test_training_gives_the_gradients_of_the_reference() -> None:
    images, found = torch.randn(4, 3, 224, 224, device=DEVICE), []
    for name in ("reference", "triton"):
        model = vit(backend=name)
        torch.manual_seed(1)
        for parameter in (p for n, p in model.named_parameters() if "reactivation" in n):
            nn.init.normal_(parameter, std=0.1)
        model(images).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "reactivation" in n})
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-2, atol=1e-2 * scale, msg=name)


def attention(dtype: torch.dtype, tokens: int = 197) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, _, size, _ = checks.drawn(4, tokens, 6, 64, 4, DEVICE, dtype)
    query, value = (checks.drawn(4, tokens, 6, 64, 4, DEVICE, dtype, seed)[0] for seed in (1, 2))
    return query, keys, value, size


@pytest.mark.parametrize("way", ["fused", "augmented", "flex"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [157, 197, 1370])
def test_attention_errs_no_more_than_twice_the_mask(tokens: int, dtype: torch.dtype, way: str) -> None:
    query, key, value, size = attention(dtype, tokens)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=proportional(size, torch.float64)
    )
    masked = F.scaled_dot_product_attention(query, key, value, attn_mask=proportional(size, dtype, "mask"))
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=proportional(size, dtype, way))
    allowed = 2 * (masked - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def test_flash_attention_runs_with_sizes() -> None:
    query, key, value, size = attention(torch.bfloat16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        F.scaled_dot_product_attention(query, key, value, attn_mask=proportional(size, torch.bfloat16, "augmented"))
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, key, value, attn_mask=proportional(size, torch.bfloat16, "mask"))


def test_flex_attention_has_the_gradients_of_the_mask() -> None:
    found = []
    for way in ("mask", "flex"):
        query, key, value, size = attention(torch.float32)
        leaves = [part.requires_grad_() for part in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*leaves, attn_mask=proportional(size, torch.float32, way))
        found.append(torch.autograd.grad(mixed.square().sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = "import torch; from pyra.kernels import checks; said = checks.disagreement(torch.device('cuda')); "
    program += "torch.cuda.synchronize(); raise SystemExit(said or 0)"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", program]
    # PyTorch's cache of memory would hide what goes beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]


def test_copies_run() -> None:
    images = torch.randn(2, 3, 224, 224, device=DEVICE)
    model = vit()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(images), model(images))

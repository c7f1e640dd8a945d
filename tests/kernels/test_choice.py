"""Which implementation runs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyra import PyraConfig, match_tokens
from pyra.errors import ConfigError, KernelError
from pyra.kernels import backend, choice
from pyra.kernels.bias import bias
from pyra.kernels.choice import as_operator, interpreted, runs_triton

CPU = torch.randn(1, 9, 4)


def test_plain_pytorch_is_the_default() -> None:
    assert not runs_triton(CPU)
    with backend("reference"):
        assert not runs_triton(CPU) and match_tokens(CPU, 2).removed == 2


@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 lets Triton run on a CPU")
def test_triton_on_a_cpu_is_an_error() -> None:
    said = r"backend 'triton' cannot run: .*; use 'auto' or 'reference'"
    with pytest.raises(KernelError, match=said), backend("triton"):
        match_tokens(CPU, 2)
    assert not runs_triton(CPU)
    with pytest.raises(KernelError, match="on cpu, and TRITON_INTERPRET=1 is not set"):
        runs_triton(CPU, "triton")


def test_a_choice_ends_with_its_block_even_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backend("reference"):
        _ = 1 / 0
    with backend("reference"), backend("auto"):
        assert not runs_triton(CPU)


def test_an_unknown_name_is_refused() -> None:
    with (
        pytest.raises(KernelError, match="backend must be one of auto, reference, triton, got 'cuda'"),
        backend("cuda"),
    ):
        pass
    with pytest.raises(ConfigError, match="backend must be one of"):
        PyraConfig(rate=0.5, backend="cuda")


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_compiled_graph_holds_operators_and_asks_for_no_device(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """As on a GPU: a graph for the device "meta", where no kernel runs, is traced whole and without a warning."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _inputs: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if as_operator(x, name) else x - 1

    torch.compiler.reset()
    torch.compile(step, backend=look, fullgraph=True)(torch.ones(3, device="meta"))
    assert ("add" in str(seen)) == (name == "triton")
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_a_compiler_for_a_gpu_gets_the_bias_as_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying the kernels out is left to the operator: a compiler cannot trace it."""
    monkeypatch.setattr(choice, "_agrees", lambda device: pytest.fail(f"tried on {device}"))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with FakeTensorMode():
        found = bias(torch.ones(2, 5, 1, device="cuda"), torch.float32, -1e4)
    assert found.shape == (2, 1, 1, 5)


def test_blocks_of_threads_may_end_in_any_order() -> None:
    first, second = backend("reference"), backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert choice._open == []

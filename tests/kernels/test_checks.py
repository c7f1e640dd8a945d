"""The check that "auto" makes before it trusts the kernels of a GPU: it passes what is right, and nothing else."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyra.kernels import checks, choice
from pyra.kernels.choice import interpreted, runs_triton

CPU = torch.device("cpu")
in_the_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 (make test-kernels)")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" take the CPU for a device that has Triton."""
    monkeypatch.setattr(choice, "_no_triton_on", lambda tensor, asked: None)
    for cached in (choice._agrees, choice._say_once):
        monkeypatch.setattr(choice, cached.__name__, importlib.import_module("functools").cache(cached.__wrapped__))


@in_the_interpreter
def test_the_kernels_pass() -> None:
    state = torch.random.get_rng_state()
    assert checks.disagreement(CPU) is None
    assert torch.equal(torch.random.get_rng_state(), state)


def swapped(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let the first two sources trade places, but not their destinations."""
    source = result[0].clone()
    source[:, :2] = result[0][:, [1, 0]]
    return source, *result[1:]


def grown(result: Any) -> Any:
    """Scale the first tensor by a hundredth."""
    return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01


def shifted(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move every entry of the second tensor (an index) by one place."""
    return result[0], result[1].roll(1, dims=1), *result[2:]


FAULTS = [
    ("match_triton", "match_bipartite", swapped, "match_tokens"),
    ("match_triton", "match_bipartite", shifted, "match_tokens"),
    ("merge_triton", "merge_forward", grown, "merge_tokens: error"),
    ("merge_triton", "merge_backward", grown, "merge_tokens_backward, x: error"),
    ("follow_triton", "follow_tokens", shifted, "follow_tokens"),
    ("bias_triton", "size_bias", grown, "size_bias"),
    ("attend_triton", "attend_sizes", grown, "attend_sizes"),
]


@in_the_interpreter
@pytest.mark.parametrize(("file", "name", "fault", "said"), FAULTS)
def test_a_kernel_that_errs_is_named(
    file: str, name: str, fault: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"pyra.kernels.{file}")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: fault(right(*arguments)))
    found = checks.disagreement(CPU)
    assert found is not None and found.startswith(said)


@in_the_interpreter
def test_a_kernel_that_changes_from_run_to_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyra.kernels.merge_triton")
    right, runs = module.merge_forward, []

    def unsteady(*arguments: Any) -> Any:
        merged, size = right(*arguments)
        runs.append(1)
        return merged * (1 + 1e-6 * (len(runs) % 2)), size

    monkeypatch.setattr(module, "merge_forward", unsteady)
    assert checks.disagreement(CPU) == "merge_tokens: two runs differ"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_auto_takes_kernels_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(checks, "disagreement", lambda device: seen.append(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs_triton(torch.ones(1)) and runs_triton(torch.ones(1))
    assert seen == [CPU]
    with choice.backend("reference"):
        assert not runs_triton(torch.ones(1))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "disagreement", lambda device: "merge_tokens: two runs differ")
    with pytest.warns(UserWarning, match="plain PyTorch on cpu: .* failed their check: merge_tokens: two runs differ"):
        assert not runs_triton(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_triton(torch.ones(1))


@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 lets Triton run on a CPU")
def test_a_failure_to_run_is_a_finding() -> None:
    assert "KernelError: backend 'triton' cannot run" in str(checks.disagreement(CPU))

"""The step of exported graphs does what the operators do, and its graph scatters nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyra import Reactivation
from pyra.kernels import exported
from pyra.kernels.match import Rules
from pyra.step import merge_step

RULES = Rules("grouped", "bipartite", 0.9, None, 1)


def weights(dtype: torch.dtype = torch.float64) -> Reactivation:
    module = Reactivation(4, 6)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("count", [7, 8, 17, 50])
def test_it_does_what_the_operators_do(count: int, prefix: int) -> None:
    torch.manual_seed(count)
    x, keys = torch.randn(3, count, 6).double(), torch.randn(3, 2, count, 4).double()
    for r in {1, 2, (count - prefix) // 2} & set(range(1, (count - prefix) // 2 + 1)):
        for later in (False, True):
            state: tuple[Tensor | None, ...] = (None, None, None)
            if later:
                sizes = torch.randint(1, 5, (3, count, 1), dtype=torch.int32)
                state = (sizes, torch.randint(0, count, (3, 60)), torch.randperm(count).expand(3, count))
            for module, scaled in ((None, False), (weights(), False), (weights(), True)):
                expected = merge_step(x, *state, keys, 1, module, r, prefix, RULES, scaled_gates=scaled)
                actual = exported.step(x, *state, keys.mean(1), module, r, prefix, scaled)
                for ours, theirs in zip(actual, expected, strict=True):
                    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-12, atol=1e-12)


def test_padding_and_tokens_that_take_no_part_stay_as_they_are() -> None:
    torch.manual_seed(0)
    x, features = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    size = torch.ones(1, 9, 1)
    size[0, 5:] = 0
    left, sizes, *_ = exported.step(x, size, None, None, features, None, 2, 1)
    assert left.isfinite().all() and sizes.sum() == 5
    plain, _, _, positions = exported.step(x, None, None, None, features, None, 2, 1)
    same = [position for row, position in enumerate(positions[0]) if torch.equal(plain[0, row], x[0, position])]
    assert len(same) >= 5 and int(positions[0, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_traced_step_scatters_nothing(dtype: torch.dtype) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = weights(dtype)

        def forward(self, x: Tensor) -> Any:
            state: Any = (x, None, None, None)
            for _ in range(2):
                state = merge_step(*state, state[0].unsqueeze(1), 1, self.act, 3, 1, RULES)
            return state[0], state[1], state[2]

    x = torch.randn(4, 17, 6).to(dtype)
    with torch.no_grad():
        program = torch.export.export(Twice(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    names = {str(node.target) for node in program.graph.nodes}
    assert any("topk" in name for name in names)
    assert not any(part in name for name in names for part in ("scatter", "index_add", "pyra", "index_put"))
    found, expected = program.module()(x[:3]), Twice()
    expected.load_state_dict(program.state_dict)
    for ours, theirs in zip(found, expected(x[:3]), strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-2, atol=1e-2)

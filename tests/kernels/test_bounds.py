"""No kernel touches a byte outside its tensors: the interpreter runs them between pages that no access survives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mprotect")

KERNELS = """
import torch
from guarded import run
from pyra.kernels import backend, match
from pyra.kernels.match import Rules
from pyra.kernels.match_triton import match_bipartite
from pyra.kernels.merge import Plan, Weights
from pyra.kernels.merge_triton import merge_backward, merge_forward
from pyra.kernels.follow_triton import follow_tokens
from pyra.kernels.bias_triton import size_bias
from pyra.kernels.attend_triton import attend_sizes
from support_for_kernels import plan_for, sizes, tokens_for, weights_for

def cases(guard):
    for tokens, prefix, heads, dim, removed in SHAPES:
        keys = guard(torch.randn(2, heads, tokens, dim, generator=torch.Generator().manual_seed(0)))
        for order in ("grouped", "sequence"):
            match_bipartite(keys, 1, removed, prefix, order)
        made = [plan_for(tokens, prefix, removed, dropping) for dropping in (False, True)]
        for plan in (Plan(*map(guard, each)) for each in made):
            for kind, trained in (("none", "plainly"), ("whole", "affine"), ("real", "fewer-pairs")):
                x, size = guard(tokens_for(tokens, heads * dim)), guard(sizes(kind, tokens))
                known = weights_for(trained, max(removed, 2), heads * dim)
                weights = known and Weights(*(guard(part) for part in known[:4]), 1e-5)
                merged, total = merge_forward(x, size, plan, weights)
                merge_backward(guard(merged), guard(total), x, size, plan, weights)
            earlier = guard(torch.arange(tokens + 3).clamp_max(tokens - 1).repeat(2, 1))
            places = guard(torch.arange(tokens).repeat(2, 1))
            for before in ((None, None), (earlier, places)):
                follow_tokens(guard(total), *before, plan.kept, plan.source, plan.target)
            size_bias(guard(sizes("padding", tokens)), torch.bfloat16, -3e38)
        query, value = (guard(torch.randn(2, heads, tokens, dim).bfloat16()) for _ in range(2))
        attend_sizes(query, guard(keys.bfloat16()), value, guard(sizes("padding", tokens)), 0.3)

SHAPES = ((17, 1, 2, 8, 8), (16, 0, 3, 20, 5), (67, 2, 2, 33, 32), (9, 1, 1, 4, 0), (3, 1, 1, 8, 1), (5, 5, 1, 8, 0))
run(cases)
print("all inside")
"""


def in_a_process_of_its_own(program: str) -> subprocess.CompletedProcess[str]:
    support = Path(__file__).resolve().parent.parent / "support"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(support), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("place", [0, -1])
def test_an_access_outside_ends_the_process(place: int) -> None:
    said = in_a_process_of_its_own(f"import guarded; guarded.beyond({place})")
    assert said.returncode < 0, said  # by a signal


@pytest.mark.slow  # all kernels in Triton's interpreter, in a process of their own
def test_every_access_is_inside() -> None:
    said = in_a_process_of_its_own(KERNELS)
    assert said.returncode == 0, said.stderr[-2000:]
    assert "all inside" in said.stdout

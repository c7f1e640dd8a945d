"""Every kernel compiles for the GPUs it is meant for, on any machine; registers and shared memory are printed (-rP)."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pyra.kernels
from pyra.kernels.choice import interpreted

triton = pytest.importorskip("triton", reason="triton has no build for this platform")
pytestmark = [
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.slow,  # half a minute of compiling
]
CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a program may use
STRIDES = (
    *("stride_b", "stride_n", "stride_h", "stride_gb", "stride_gn", "stride_sb", "stride_s"),
    *("stride_tb", "stride_t", "stride_mb", "stride_m", "stride_pb", "stride_p"),
    *(f"stride_{of}{axis}" for of in "qkv" for axis in "bhn"),
)
FLOATS = (
    "best similarity merged_size channel_gate pair_gate weight sums_gradient token_gradient pair_weight_gradient "
    "channel_weight_gradient norm_weight_gradient norm_bias_gradient total unit"
)
TYPES = (
    dict.fromkeys(["source", "destination", "kept", "target"], "*i64")
    | dict.fromkeys(["old_map", "old_places", "row_after", "new_map", "new_places"], "*i64")
    | dict.fromkeys(["partner", "before", "by_row", "first", "sizes", "size"], "*i32")
    | dict.fromkeys(FLOATS.split(), "*fp32")
    | dict.fromkeys(["features", "x", "gradient", "merged", "out", "query", "key", "value"], "*bf16")
    | dict.fromkeys(["pair_weight", "channel_weight", "norm_weight", "norm_bias"], "*bf16")
    | {"eps": "fp32", "lowest": "fp32", "scale": "fp32"}
)
WHOLE = {"HAS_SIZE": True, "HAS_WEIGHT": False, "REACTIVATED": True, "SCALED": True, "SHIFTED": True}
UNIT = dict.fromkeys(["stride_c", "stride_d", "stride_gc", "stride_qd", "stride_kd", "stride_vd"], 1)


def variants() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Kernel, constants and warps as the launchers choose them for ViT-B, ViT-L and SigLIP-So400m."""
    from pyra.kernels import attend_triton as a
    from pyra.kernels import bias_triton as b
    from pyra.kernels import follow_triton as f
    from pyra.kernels import match_triton as m
    from pyra.kernels import merge_triton as g

    found: dict[str, tuple[Any, dict[str, Any], int]] = {}
    layers = [("vit-b", 197, 12, 64), ("vit-l-384", 577, 16, 64), ("so400m", 729, 16, 72), ("wide", 197, 1, 4096)]
    for name, tokens, heads, dim in layers:
        side, width = m.tile(tokens, dim), triton.next_power_of_2(dim)
        sides = {"ROWS": side, "COLUMNS": side}
        shape = {"DIM": width, "HEADS": heads, "TILE": m.tokens_a_program(width)}
        found[f"unit-{name}"] = (m.unit_kernel, shape, m.UNIT_WARPS)
        found[f"best-{name}"] = (
            m.best_kernel,
            {"DIM": min(width, m.CHANNELS_A_STEP), "LONG": dim > m.CHANNELS_A_STEP} | sides,
            m.BEST_WARPS,
        )
        found[f"rank-{name}"] = (m.rank_kernel, sides | {"GROUPED": True}, m.RANK_WARPS)
    for name, channels in (("vit-b", 768), ("so400m", 1152), ("wide", 4096)):
        width = {"CHANNELS": triton.next_power_of_2(channels)}
        pairs, rows, tile = {"PAIRS": g.pairs_a_tile(channels)}, {"ROWS": g.ROWS_A_PROGRAM}, {"TILE": g.INDICES_A_TILE}
        found[f"prepare-{name}"] = (g.prepare_kernel, width | pairs | tile | WHOLE, g.PREPARE_WARPS)
        found[f"merge-{name}"] = (g.merge_kernel, width | rows | WHOLE, g.ROWS_WARPS)
        found[f"pairs-backward-{name}"] = (g.pairs_backward_kernel, width | pairs | WHOLE, g.PAIRS_WARPS)
        found[f"tokens-backward-{name}"] = (g.tokens_backward_kernel, width | rows | WHOLE, g.ROWS_WARPS)
    tile = {"TILE": f.ENTRIES_A_TILE, "HAS_MAP": True, "HAS_PLACES": True}
    found["follow"] = (f.follow_kernel, tile, f.WARPS)
    for name, dim in (("vit", 64), ("so400m", 72), ("wide", 128)):
        tiles = {"DIM": triton.next_power_of_2(dim), "ROWS": a.ROWS_A_PROGRAM, "KEYS": a.KEYS_A_TILE}
        found[f"attend-{name}"] = (a.attend_kernel, tiles | {"WHOLE": dim != 72, "WIDEN": False}, a.WARPS)
    found["bias"] = (b.bias_kernel, {"TILE": b.TOKENS_A_PROGRAM}, b.WARPS)
    return found


def test_no_kernel_is_left_out() -> None:
    written = set()
    for file in Path(pyra.kernels.__file__).parent.glob("*_triton.py"):
        module = importlib.import_module(f"pyra.kernels.{file.stem}")
        written |= {name for name in vars(module) if name.endswith("_kernel")}
    assert {kernel.fn.__name__ for kernel, _, _ in variants().values()} == written


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_ahead_of_time(capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pyra.kernels.match_triton import BEST_STAGES

    for name, (kernel, constants, warps) in variants().items():
        names = kernel.arg_names
        fixed = {key: value for key, value in (UNIT | constants).items() if key in names}
        signature = {n: "constexpr" if n in fixed else TYPES.get(n, "i64" if n in STRIDES else "i32") for n in names}
        source = ASTSource(kernel, signature, {(names.index(key),): value for key, value in fixed.items()})
        options = {"num_warps": warps} | ({"num_stages": BEST_STAGES} if name.startswith("best") else {})
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, stack = resources(binary.asm["cubin"], tmp_path / "kernel.cubin")
        print(f"sm_{capability} {name}: {registers} registers, {stack} B spilled, {binary.metadata.shared} B shared")
        assert binary.metadata.shared <= SHARED_MEMORY[capability]
        assert registers <= 255 and stack <= 1024


def resources(binary: bytes, file: Path) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as the tool that comes with triton reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file.write_bytes(binary)
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])

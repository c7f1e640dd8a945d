"""The C++ example, built against the installed torch, beside Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyra.export import export_model, load_exported

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cpp"


@pytest.mark.slow(reason="compiles a model and a program")
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or g++ on this machine")
def test_logits_agree_with_those_in_python(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    export_model(model, tmp_path / "aoti", "aoti", example_input=images)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(build), f"-DTORCH_ROOT={torch.__path__[0]}"],
        ["cmake", "--build", str(build)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    images.numpy().tofile(tmp_path / "pixels.f32")
    side = str(images.shape[-1])
    arguments = [str(tmp_path / "aoti" / "model.pt2"), str(tmp_path / "pixels.f32"), side]
    ran = subprocess.run([str(build / "classify"), *arguments], check=True, capture_output=True, text=True)
    found = torch.tensor([[float(value) for value in line.split()] for line in ran.stdout.splitlines()])
    expected = load_exported(tmp_path / "aoti", trust_code=True)(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    linked = subprocess.run(["ldd", str(build / "classify")], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in linked and "python" not in linked.replace(str(torch.__path__[0]), "")
    odd = subprocess.run([str(build / "classify"), *arguments[:2], "31"], capture_output=True, text=True)
    assert odd.returncode == 2 and "not a multiple" in odd.stderr

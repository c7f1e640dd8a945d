"""The C++ example, built against the installed torch, beside Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyra.export import export_model, load_exported

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cpp"
TORCH = Path(torch.__path__[0])
INCLUDES = (TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include")

pytestmark = [
    pytest.mark.slow(reason="compiles a model and a program"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
]


@pytest.fixture(scope="module")
def exported(model: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(model, folder, "aoti", example_input=images)
    images.numpy().tofile(folder / "pixels.f32")
    return folder


@pytest.fixture(scope="module", params=["cmake", "g++"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} on this machine")
    build = tmp_path_factory.mktemp("build")
    if request.param == "cmake":
        _run("cmake", "-S", EXAMPLE, "-B", build, f"-DTORCH_ROOT={TORCH}")
        _run("cmake", "--build", build)
    else:
        includes = [part for folder in INCLUDES for part in ("-isystem", folder)]
        libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,--no-as-needed"]
        libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
        _run("g++", "-std=c++20", EXAMPLE / "classify.cpp", *includes, *libraries, "-o", build / "classify")
    return build / "classify"


def _run(*command: str | Path) -> str:
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_logits_agree_with_those_in_python(program: Path, exported: Path, images: Tensor) -> None:
    found = torch.tensor([json.loads(line) for line in _run(program, exported, exported / "pixels.f32").splitlines()])
    expected = load_exported(exported, trust_code=True)(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_one_image_is_a_batch(program: Path, exported: Path, images: Tensor, tmp_path: Path) -> None:
    images[:1].numpy().tofile(tmp_path / "one.f32")
    (line,) = _run(program, exported, tmp_path / "one.f32").splitlines()
    expected = load_exported(exported, trust_code=True)(images[:1])
    torch.testing.assert_close(
        torch.tensor([json.loads(line)]), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_python_is_not_linked(program: Path) -> None:
    linked = _run("ldd", program)
    assert "libtorch_cpu" in linked and "libpython" not in linked


def test_pixels_of_another_size_are_refused(program: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.f32").write_bytes(bytes(3 * 31 * 31 * 4))
    (tmp_path / "empty.f32").touch()
    for name, said in (("odd.f32", "not a multiple"), ("empty.f32", "not a multiple"), ("none.f32", "cannot read")):
        ran = subprocess.run([program, exported, tmp_path / name], capture_output=True, text=True)
        assert ran.returncode == 1 and said in ran.stderr and not ran.stdout, name


def test_a_damaged_package_is_an_error_in_one_line(program: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "export.json", tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"damaged")
    ran = subprocess.run([program, tmp_path, exported / "pixels.f32"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith("classify: ") and not ran.stdout

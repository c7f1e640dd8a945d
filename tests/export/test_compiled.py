"""The format aoti: machine code, which is opened only where its user says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, ExportError
from pyra.export import export_model, load_exported

Images = Callable[[int], Tensor]

FILE = "model.pt2"


@pytest.mark.slow(reason="compiles C++")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_model(wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    folder = tmp_path / "aoti"
    report = export_model(wrapped, folder, "aoti", example_input=images(2))
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", FILE]
    assert report.comparison.differing == 0
    with pytest.raises(ConfigError, match=r"aoti is machine code, .*trust_code=True \(--trust-code\)"):
        load_exported(folder)
    for threads in (None, 1):
        opened = load_exported(folder, trust_code=True, threads=threads)
        for batch in (1, 2, 5):
            with torch.no_grad():
                torch.testing.assert_close(opened(images(batch)), wrapped(images(batch)), rtol=1e-4, atol=1e-5)
    record = json.loads((folder / "export.json").read_text())
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    (folder / "export.json").write_text(json.dumps({**record, "files": {FILE: len(whole) // 2}, "sha256": {}}))
    with pytest.raises(ExportError, match=r"model\.pt2: not a readable PT2 file"):
        load_exported(folder, trust_code=True)


def test_machine_code_is_not_opened_before_its_user_trusts_it(
    exported: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[object] = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", reached.append)
    record = json.loads((exported[0] / "export.json").read_text())
    (tmp_path / FILE).write_bytes(b"code")
    (tmp_path / "export.json").write_text(json.dumps({**record, "format": "aoti", "files": {FILE: 4}, "sha256": {}}))
    with pytest.raises(ConfigError, match="aoti is machine code, which runs with your rights"):
        load_exported(tmp_path)
    assert reached == []
    load_exported(tmp_path, trust_code=True)
    assert reached == [str(tmp_path / FILE)]


def test_a_machine_without_a_compiler(
    wrapped: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"aoti compiles C\+\+ code and found no compiler: install g\+\+ or clang\+\+"
    ):
        export_model(wrapped, tmp_path / "new", "aoti", example_input=images(2))
    assert list((tmp_path / "new").iterdir()) == []

"""The JavaScript example in node, beside Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyra.export import export_model
from pyra.tasks.data.decoding import decode_image, squash
from pyra.tasks.predicting import open_classifier

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METADATA = {
    "labels": json.dumps(["coat", "hat", "shoes"]),
    "image_size": "32",
    "mean": "0.5 0.4 0.3",
    "std": "0.2 0.3 0.4",
}

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")


@pytest.mark.parametrize("side", [61, 200])
def test_images_are_squashed_as_pillow_does(side: int, tmp_path: Path) -> None:
    image = decode_image(EXAMPLES / "demo.jpg")
    (tmp_path / "raw").write_bytes(np.asarray(image).tobytes())
    script = (
        f"import {{ squash }} from {json.dumps((EXAMPLES / 'web' / 'pixels.mjs').as_uri())};"
        "import { readFileSync, writeFileSync } from 'node:fs';"
        f"const raw = readFileSync({json.dumps(str(tmp_path / 'raw'))});"
        f"writeFileSync({json.dumps(str(tmp_path / 'out'))}, squash(raw, {image.width}, {image.height}, {side}));"
    )
    subprocess.run(["node", "--input-type=module", "-e", script], check=True, capture_output=True)
    found = np.fromfile(tmp_path / "out", dtype=np.uint8).reshape(side, side, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, squash(image, side, "bicubic"))


@pytest.mark.slow(reason="installs onnxruntime-web")
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine")
def test_onnx_answers_in_node_as_in_python(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json", "classify.mjs", "pixels.mjs"):
        shutil.copy(EXAMPLES / "web" / name, tmp_path / name)
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0"], cwd=tmp_path, capture_output=True, text=True
    )
    if install.returncode:
        assert "EUSAGE" not in install.stderr, "package-lock.json does not fit package.json"
        pytest.skip(f"npm cannot install onnxruntime-web here: {install.stderr[-200:]}")
    export_model(model, tmp_path / "onnx", "onnx", example_input=images, metadata=METADATA)
    image = EXAMPLES / "demo.jpg"
    command = ["node", "classify.mjs", "onnx", str(image)]
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout)
    classifier = open_classifier(tmp_path / "onnx")
    (expected,) = classifier.probabilities(classifier.prepare(decode_image(image))[None])
    assert found["index"] == int(expected.argmax()) and found["label"] == classifier.labels[found["index"]]
    assert expected.max() - expected.min() > 0.05
    torch.testing.assert_close(torch.tensor(found["logits"]).softmax(-1), expected, rtol=0, atol=1e-4)

"""`import pyra` needs torch and nothing else, and leaves the GPU alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("timm", "transformers", "peft", "datasets", "evaluate", "accelerate", "torchvision", "matplotlib", "plotly")
REPORT = """
import json, sys
import torch
print(json.dumps({"modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}))
"""


@pytest.mark.parametrize("statement", ["import pyra", "from pyra import PyraConfig, match_tokens, merge_tokens"])
def test_import_is_lean(statement: str, tmp_path: Path) -> None:
    script = f"{statement}\n{REPORT}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    report = json.loads(result.stdout)
    assert "pyra" in report["modules"]
    assert [name for name in HEAVY if name in report["modules"]] == []
    assert not report["cuda"]


def test_help_imports_no_torch(tmp_path: Path) -> None:
    script = "import sys\nfrom pyra.scripts.main import usage\nusage()\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"

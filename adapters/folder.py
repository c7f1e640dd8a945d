"""The files of an adapter folder, and reading them: each is checked, nothing is trusted.

adapter_model.safetensors   PEFT weights, re-activation weights and head
adapter_config.json         peft's configuration (absent without a PEFT method)
pyra_config.json            PyraConfig and the schedule it became (absent without merging)
README.md                   model card
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import pyra.adapters.bottleneck
import pyra.adapters.expert_lora
import pyra.adapters.prompts  # noqa: F401 - all three register their methods with peft
from pyra.adapters.targets import REACTIVATION
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError, did_you_mean
from pyra.files import read_json

WEIGHTS, PEFT_FILE, PYRA_FILE, CARD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pyra_config.json",
    "README.md",
)
PICKLED = "adapter_model.bin"  # what PEFT writes without safetensors; never read
_SCHEDULE = "solved_schedule"


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds.

    Attributes:
        folder: where it lies.
        weights: the tensors, under the names that PEFT saves them with.
        peft: PEFT's configuration; None where no method was attached.
        pyra: what merges; None where nothing does.
        schedule: tokens removed in each block where it was trained.
    """

    folder: Path
    weights: dict[str, Tensor]
    peft: PeftConfig | None
    pyra: PyraConfig | None
    schedule: list[int] | None

    def reactivation_of(self, path: str) -> str | None:
        """Return what the names of a layer's stored re-activation weights start with, or None where it has none.

        Args:
            path: of the layer in the backbone, such as ``blocks.3``.
        """
        ending = f".{path}.{REACTIVATION}."
        found = (key.removesuffix("pair_weight") for key in self.weights if key.endswith(".pair_weight"))
        return next((start for start in found if f".{start}".endswith(ending)), None)


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read a folder written by ``save_adapter`` or by stock peft.

    Raises:
        CheckpointError: where a file is missing, damaged, or written by a newer version (its unknown keys are named).
    """
    folder = Path(folder)
    weights = _read_weights(folder)
    config = _read_peft_config(folder / PEFT_FILE)
    if config is None and any(key.startswith("base_model.") or key == "prompt_embeddings" for key in weights):
        raise CheckpointError(f"{folder}: {PEFT_FILE} is missing, but {WEIGHTS} holds weights of a PEFT method")
    pyra, schedule = _read_pyra_config(folder / PYRA_FILE)
    if pyra is None and any(f".{REACTIVATION}." in key for key in weights):
        raise CheckpointError(f"{folder}: {PYRA_FILE} is missing, but re-activation weights are there: tokens merged")
    return StoredAdapter(folder, weights, config, pyra, schedule)


def merging_record(config: PyraConfig, schedule: list[int] | None) -> dict[str, Any]:
    """Return what ``pyra_config.json`` holds."""
    return {**config.to_dict(), _SCHEDULE: schedule}


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise CheckpointError(f"{folder}: {PICKLED} is pickled, which is never read: save it as safetensors")
        raise CheckpointError(
            f"{folder}: no {WEIGHTS} there; give a folder written by save_adapter, or adapter/ of a run"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


def _read_peft_config(path: Path) -> PeftConfig | None:
    if not path.is_file():
        return None
    values = _read_object(path)
    kind, version = values.get("peft_type"), values.get("peft_version") or "of unknown version"
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        kinds = [str(getattr(known, "value", known)) for known in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise CheckpointError(
            f"{path}: written by peft {version} with peft_type {kind!r}, which peft {peft.__version__} does not know"
            f"{did_you_mean(str(kind), kinds)}: upgrade peft"
        )
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    # Options that are off ask for nothing: each release of peft adds some.
    unknown = sorted(key for key, value in values.items() if key not in known and value not in (None, False, [], {}))
    if unknown:
        raise CheckpointError(
            f"{path}: written by peft {version} with {', '.join(unknown)}, which {kind} of peft {peft.__version__} "
            "does not know: upgrade peft"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # about the options that are off
            return PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:  # the file may ask for anything, and peft raises what comes up
        raise CheckpointError(f"{path}: not a usable configuration ({one_line(error)})") from None


def _read_pyra_config(path: Path) -> tuple[PyraConfig | None, list[int] | None]:
    if not path.is_file():
        return None, None
    values = _read_object(path)
    schedule = values.pop(_SCHEDULE, None)
    if not (schedule is None or (isinstance(schedule, list) and all(type(removed) is int for removed in schedule))):
        raise CheckpointError(f"{path}: {_SCHEDULE} should be a list of whole numbers, found {schedule!r}")
    try:
        return PyraConfig.from_dict(values), schedule
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values

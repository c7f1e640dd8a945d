"""What a checkpoint folder of JoyAI-LLM Flash holds, told from its configuration, its index and its headers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyra.backbones.joyai import MODEL_TYPES, JoyAIConfig, JoyAIForCausalLM
from pyra.backbones.joyai_quantised import Storage, read_storage
from pyra.errors import CheckpointError
from pyra.files import read_object

CONFIG, SINGLE, INDEX, MTP = "config.json", "model.safetensors", "model.safetensors.index.json", "model-mtp.safetensors"
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.")
_STACKED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj$")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Of a configuration: what names code, or a kernel that would be fetched from the hub.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_IGNORED = ("model_type", "auto_map", "custom_pipelines", *_KERNELS)
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked.

    Attributes:
        folder: of the checkpoint.
        config: that it describes.
        shapes: of its weights, by name; those of quantised ones as they will be.
        files: that hold its tensors, by name.
        storage: how the tensors make up the weights.
    """

    folder: Path
    config: JoyAIConfig
    shapes: dict[str, list[int]]
    files: dict[str, str]
    storage: Storage

    @property
    def quantised(self) -> str | None:
        """How the weights are quantised, such as ``INT4 in groups of 64``; None where none are."""
        return None if self.storage.scheme is None else self.storage.scheme.name

    @property
    def mtp(self) -> list[str]:
        """Names of the weights of the MTP layers, which are numbered on from the last layer."""
        last = self.config.num_hidden_layers
        return sorted(name for name in self.shapes if (found := _LAYER.match(name)) and int(found[1]) >= last)


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the configuration, the index and the headers of all shards, no weights.

    Raises:
        CheckpointError: for a configuration of another model, missing or cut-off shards, experts whose number is not
            that of the configuration, tensors of other sizes, or weights that are quantised in a way that is not read.
            All problems of a kind are named at once.
    """
    folder = Path(folder).expanduser()
    values = read_json(folder / CONFIG)
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {kind!r}, not one of {', '.join(MODEL_TYPES)}")
    try:
        config = JoyAIConfig(**{key: value for key, value in values.items() if key not in _IGNORED})
    except Exception as error:  # transformers has several classes for values that do not fit
        raise CheckpointError(f"{folder / CONFIG}: {' '.join(str(error).split())[:200]}") from None
    named = _weight_map(folder)
    missing = sorted({file for file in named.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder}: {some(missing)} {'is' if len(missing) == 1 else 'are'} missing: download again"
        )
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for file in sorted(set(named.values())):
        header = read_header(folder / file)
        absent = sorted(name for name, home in named.items() if home == file and name not in header)
        if absent:
            raise CheckpointError(f"{folder / file} does not hold {some(absent)}, which {INDEX} says")
        shapes |= {name: header[name][0] for name, home in named.items() if home == file}
        dtypes |= {name: header[name][1] for name, home in named.items() if home == file}
    try:
        storage = read_storage(values.get("quantization_config"), shapes, dtypes)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    problems = _expert_problems(config, shapes) or storage.problems or _shape_problems(config, storage.shapes)
    if problems:
        raise CheckpointError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems[:4])}")
    return Checkpoint(folder, config, storage.shapes, named, storage)


def _weight_map(folder: Path) -> dict[str, str]:
    """Return which file holds each tensor."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        odd = [file for file in named.values() if not isinstance(file, str) or Path(file).name != file]
        if odd:
            raise CheckpointError(f"{folder / INDEX} names {odd[0]!r}, which is no file beside it")
        return named
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a checkpoint")
    return dict.fromkeys(read_header(folder / SINGLE), SINGLE)


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Return the shapes and types in the header of a safetensors file that is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is cut off or no safetensors file: download it again")
        text = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        told = {name: ([int(side) for side in entry["shape"]], str(entry["dtype"])) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes, its header says {8 + length + end}: download it again")
    return told


def _expert_problems(config: JoyAIConfig, shapes: Mapping[str, list[int]]) -> list[str]:
    """Say which layers have other experts than the configuration."""
    experts, layers = config.n_routed_experts, range(config.first_k_dense_replace or 0, config.num_hidden_layers)
    single: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for name, shape in shapes.items():
        if found := _EXPERT.match(name):
            single[int(found[1])][found[3]].add(int(found[2]))
        elif found := _STACKED.match(name):
            counts[int(found[1])]["experts"] = shape[0]
        elif found := _ROUTER.match(name):
            counts[int(found[1])]["router rows"] = shape[0]
    problems = []
    for layer in layers:
        for projection, have in single[layer].items():
            lost = sorted(set(range(experts)) - have)
            if len(have) > experts or max(have) >= experts:
                problems.append(f"layer {layer} has {max(have) + 1} experts, not {experts}")
            elif lost:
                problems.append(f"layer {layer} lacks {projection} of experts {some(lost)}")
        problems += [
            f"layer {layer} has {count} {what}, not {experts}"
            for what, count in counts[layer].items()
            if count != experts
        ]
        if not single[layer] and "experts" not in counts[layer]:
            problems.append(f"layer {layer} has no experts")
    return problems


def _shape_problems(config: JoyAIConfig, shapes: Mapping[str, list[int]]) -> list[str]:
    """Name weights of other sizes than the configuration's."""
    with torch.device("meta"):
        expected = {name: list(value.shape) for name, value in JoyAIForCausalLM(config).state_dict().items()}
    for name in [name for name in expected if name.endswith(".experts.gate_up_proj")]:
        stem, (experts, both, width) = name.removesuffix("gate_up_proj"), expected[name]
        for index in range(experts):
            sides = {"gate_proj": [both // 2, width], "up_proj": [both // 2, width], "down_proj": [width, both // 2]}
            expected |= {f"{stem}{index}.{projection}.weight": shape for projection, shape in sides.items()}
    return [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; raises :class:`CheckpointError` where there is none."""
    return read_object(path, CheckpointError, "give the folder of a checkpoint")


def some(names: Iterable[object]) -> str:
    """Name the first few."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")

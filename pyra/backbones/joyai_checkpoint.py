"""Checkpoints of JoyAI-LLM Flash: what a folder must hold is checked before a weight is read, and it is written back.

A published folder holds ``config.json``, an index, a shard a layer with a matrix an expert, and a shard of the MTP
layer. Only safetensors are read.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyra.backbones.joyai import MODEL_TYPES, PUBLISHED, JoyAIConfig, JoyAIForCausalLM
from pyra.checkpoints import writing
from pyra.errors import CheckpointError, ConfigError, OutputError
from pyra.files import read_object, write_json

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
        shapes: of its tensors, by name.
        files: that hold them, by name.
    """

    folder: Path
    config: JoyAIConfig
    shapes: dict[str, list[int]]
    files: dict[str, str]

    @property
    def mtp(self) -> list[str]:
        """Names of the tensors of the MTP layers, which are numbered on from the last layer."""
        last = self.config.num_hidden_layers
        return sorted(name for name in self.files if (found := _LAYER.match(name)) and int(found[1]) >= last)


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the configuration, the index and the headers of all shards, no weights.

    Raises:
        CheckpointError: for a configuration of another model, missing or cut-off shards, experts whose number is not
            that of the configuration, or tensors of other sizes. All problems of a kind are named at once.
    """
    folder = Path(folder).expanduser()
    values = _json(folder / CONFIG)
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
            f"{folder}: {_some(missing)} {'is' if len(missing) == 1 else 'are'} missing: download again"
        )
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(named.values())):
        header = _header(folder / file)
        absent = sorted(name for name, home in named.items() if home == file and name not in header)
        if absent:
            raise CheckpointError(f"{folder / file} does not hold {_some(absent)}, which {INDEX} says")
        shapes |= {name: header[name] for name, home in named.items() if home == file}
    problems = _expert_problems(config, shapes) or _shape_problems(config, shapes)
    if problems:
        raise CheckpointError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems[:4])}")
    return Checkpoint(folder, config, shapes, named)


def load_model(folder: str | Path, **kwargs: Any) -> JoyAIForCausalLM:
    """Open a checkpoint folder, checked first; copies that call themselves ``deepseek_v3`` as well.

    Args:
        folder: of the checkpoint.
        kwargs: of transformers' ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        CheckpointError: see :func:`check_checkpoint`; and where tensors of the model are missing.
    """
    checkpoint = check_checkpoint(folder)
    model, found = JoyAIForCausalLM.from_pretrained(
        str(checkpoint.folder),
        config=checkpoint.config,
        use_safetensors=True,
        output_loading_info=True,
        **{"dtype": "auto", **kwargs},
    )
    if found["missing_keys"]:
        raise CheckpointError(f"{folder} leaves {_some(sorted(found['missing_keys']))} out: download again")
    return model


def save_checkpoint(
    model: JoyAIForCausalLM,
    folder: str | Path,
    *,
    mtp: str | Path | None = None,
    shard: str = "5GB",
    model_type: str = MODEL_TYPES[0],
) -> None:
    """Write a model in the published layout: a matrix an expert, and the MTP layer in a shard of its own.

    Args:
        model: to write; weights keep their bits.
        folder: that is made; it is there as a whole or not at all.
        mtp: a checkpoint folder whose MTP weights go along; without it the configuration says that there are none.
        shard: size of a file at most, as transformers reads it.
        model_type: what the configuration calls itself; as ``deepseek_v3`` transformers opens it without pyra.

    Raises:
        ConfigError: for an unknown ``model_type``, or a model of another class, such as one with an adapter around it.
        OutputError: where ``folder`` holds something already.
        CheckpointError: where ``mtp`` holds no MTP weights, or those of another width.
    """
    if not isinstance(model, JoyAIForCausalLM):
        raise ConfigError(
            f"save_checkpoint writes a JoyAIForCausalLM, got {type(model).__name__}: fold its adapter first"
        )
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already: choose another folder")
    drafting = {} if mtp is None else _mtp_weights(check_checkpoint(mtp), model.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with writing(staging):
            model.save_pretrained(staging, max_shard_size=shard)
            if drafting:
                save_file(drafting, staging / MTP, metadata={"format": "pt"})
        _index(staging, drafting)
        values = _json(staging / CONFIG)
        values |= {"architectures": PUBLISHED["architectures"], "model_type": model_type}
        values["num_nextn_predict_layers"] = model.config.num_nextn_predict_layers if drafting else 0
        write_json(staging / CONFIG, values)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(folder: Path, drafting: Mapping[str, Tensor]) -> None:
    """Have the index name the MTP shard; a single file of weights becomes a shard, too, or it would be read alone."""
    if not drafting:
        return
    if (folder / SINGLE).is_file():
        shard = "model-00001-of-00001.safetensors"
        (folder / SINGLE).replace(folder / shard)
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(_header(folder / shard), shard)}
    else:
        index = _json(folder / INDEX)
    index["weight_map"] |= dict.fromkeys(drafting, MTP)
    size = sum((folder / file).stat().st_size for file in set(index["weight_map"].values()))
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    write_json(folder / INDEX, index)


def _mtp_weights(checkpoint: Checkpoint, config: JoyAIConfig) -> dict[str, Tensor]:
    last = config.num_hidden_layers
    if not checkpoint.mtp:
        raise CheckpointError(f"{checkpoint.folder} holds no MTP weights")
    own, theirs = (last, config.hidden_size), (checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size)
    if own != theirs:
        raise CheckpointError(
            f"{checkpoint.folder}: its MTP layer follows {theirs[0]} layers of width {theirs[1]}, the model has "
            f"{own[0]} of width {own[1]}"
        )
    weights: dict[str, Tensor] = {}
    for file in sorted({checkpoint.files[name] for name in checkpoint.mtp}):
        with safe_open(checkpoint.folder / file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in checkpoint.mtp if checkpoint.files[name] == file}
    return weights


def _weight_map(folder: Path) -> dict[str, str]:
    """Return which file holds each tensor."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        named = _json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        odd = [file for file in named.values() if not isinstance(file, str) or Path(file).name != file]
        if odd:
            raise CheckpointError(f"{folder / INDEX} names {odd[0]!r}, which is no file beside it")
        return named
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a checkpoint")
    return dict.fromkeys(_header(folder / SINGLE), SINGLE)


def _header(path: Path) -> dict[str, list[int]]:
    """Return the shapes in the header of a safetensors file that is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is cut off or no safetensors file: download it again")
        text = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        shapes = {name: [int(side) for side in entry["shape"]] for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes, its header says {8 + length + end}: download it again")
    return shapes


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
                problems.append(f"layer {layer} lacks {projection} of experts {_some(lost)}")
        problems += [
            f"layer {layer} has {count} {what}, not {experts}"
            for what, count in counts[layer].items()
            if count != experts
        ]
        if not single[layer] and "experts" not in counts[layer]:
            problems.append(f"layer {layer} has no experts")
    return problems


def _shape_problems(config: JoyAIConfig, shapes: Mapping[str, list[int]]) -> list[str]:
    """Name tensors of other sizes than the configuration's; a quantised checkpoint has sizes of its own."""
    if getattr(config, "quantization_config", None):
        return []
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


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "give the folder of a checkpoint")


def _some(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def check_tokenizer(tokenizer: Any, config: JoyAIConfig) -> None:
    """Hold a tokenizer against a configuration: the first token of a text is the one that the model was trained with.

    Raises:
        ConfigError: where the tokenizer has no or another token for the beginning of a text, does not put it there, or
            has more tokens than the model.
    """
    expected = config.bos_token_id
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: it is another model's"
        )
    if expected is None:
        return
    if tokenizer.bos_token_id != expected:
        raise ConfigError(
            f"the tokenizer's first token of a text (BOS) is {tokenizer.bos_token_id}, the model's {expected}: set "
            "tokenizer.bos_token, or take the checkpoint's own tokenizer"
        )
    if tokenizer("a")["input_ids"][:1] != [expected]:
        raise ConfigError(
            f"the tokenizer does not begin a text with BOS ({expected}), which the model expects: open it with "
            "add_bos_token=True, or write the token in front of every text"
        )

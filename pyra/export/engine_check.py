"""A folder held against what engines read: every tensor known, every needed one there, each of its shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyra.backbones.joyai_folder import CONFIG, INDEX, SINGLE, read_header, some
from pyra.backbones.joyai_quantised import read_storage
from pyra.errors import CheckpointError, ExportError
from pyra.export.engine_names import DEEPSEEK, Engine, dense_mlp, engines_for, latent_attention, mixture, needed_shapes
from pyra.files import read_object

_LAYER, _EXPERT = re.compile(r"^model\.layers\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")


def template_of(name: str) -> str:
    """Return the name with ``{l}`` and ``{e}`` for the numbers of its layer and expert.

    >>> template_of("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.{l}.mlp.experts.{e}.up_proj.weight'
    """
    return _EXPERT.sub(".experts.{e}.", _LAYER.sub("model.layers.{l}.", name))


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of a folder's weights from the headers of its files; quantised ones as the weights they are.

    Raises:
        ExportError: where a file is missing or damaged, or the index does not say what the files hold.
    """
    values = read_object(folder / CONFIG, ExportError, "export again")
    try:
        if (folder / INDEX).is_file():
            named = read_object(folder / INDEX, ExportError, "export again").get("weight_map") or {}
        else:
            named = dict.fromkeys(read_header(folder / SINGLE), SINGLE)
        headers = {file: read_header(folder / file) for file in sorted(set(named.values()))}
        held = {name: entry for header in headers.values() for name, entry in header.items()}
        if sum(map(len, headers.values())) != len(named) or held.keys() != named.keys():
            odd = sorted(held.keys() ^ named.keys()) or ["a tensor in two files"]
            raise ExportError(f"{folder / INDEX} does not say what the files hold: {some(odd)}")
        shapes, dtypes = ({name: entry[side] for name, entry in held.items()} for side in (0, 1))
        storage = read_storage(values.get("quantization_config"), shapes, dtypes)  # type: ignore[arg-type]
    except (OSError, CheckpointError) as error:
        raise ExportError(f"{folder}: {error}") from None
    if storage.problems:
        raise ExportError(f"{folder}: {'; '.join(storage.problems[:4])}")
    return storage.shapes


def check_engine_folder(folder: Path) -> list[dict[str, Any]]:
    """Hold a written folder against each engine's list.

    Returns:
        A row an engine: its name, the revision and file of its source, the tensors it reads, those it passes over
            (MTP), and into how many kinds of parameters they go.

    Raises:
        ExportError: naming tensors that are missing, unknown or of another shape, or keys that an engine reads and
            ``config.json`` leaves out.
    """
    values = read_object(folder / CONFIG, ExportError, "export again")
    shapes = stored_shapes(folder)
    rows, problems = [], []
    for engine in engines_for(values.get("model_type", "")):
        row, found = _held_against(engine, values, shapes)
        rows.append(row)
        problems += [f"{engine.name}: {problem}" for problem in found]
    if problems:
        raise ExportError(f"{folder} is not what engines read: {'; '.join(problems[:6])}")
    return rows


def _held_against(
    engine: Engine, values: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> tuple[dict[str, Any], list[str]]:
    """Return the row of an engine, and what is wrong."""
    lacking = [key for key in engine.keys if key not in values]
    if lacking:
        return {}, [f"config.json leaves {some(lacking)} out"]
    own, drafting = _apart(values, shapes)
    expected = needed_shapes(values)
    problems = _differences(own, expected)
    if unknown := sorted({template_of(name) for name in expected} - engine.parameters.keys()):
        problems.append(f"has no parameter for {some(unknown)}")
    problems += _mtp_problems(values, drafting)
    into = {engine.parameters.get(template_of(name)) for name in own}
    row = {
        "engine": engine.name,
        "revision": engine.revision,
        "source": engine.file,
        "tensors": len(own),
        "passed_over": len(drafting),
        "parameters": len(into),
    }
    return row, problems


def _apart(
    values: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Tell the model's tensors from those of MTP layers, which engines read apart or not at all."""
    own: dict[str, list[int]] = {}
    drafting: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        layer = _LAYER.match(name)
        after = layer is not None and int(layer[1]) >= values["num_hidden_layers"]
        (drafting if after and values["model_type"] == DEEPSEEK else own)[name] = shape
    return own, drafting


def _differences(found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> list[str]:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = [f"{some(missing)} missing"] if missing else []
    problems += [f"{some(unknown)} not known"] if unknown else []
    return problems + [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def _mtp_problems(values: Mapping[str, Any], drafting: Mapping[str, list[int]]) -> list[str]:
    """Say what is wrong with MTP layers; theirs are the numbers on from the last layer."""
    if values["model_type"] != DEEPSEEK:
        return []
    width, words = values["hidden_size"], values["vocab_size"]
    expected: dict[str, list[int]] = {}
    for layer in range(values["num_hidden_layers"], values["num_hidden_layers"] + values["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}{name}.weight": [width] for name in ("enorm", "hnorm", "shared_head.norm")}
        expected[f"{prefix}eh_proj.weight"] = [width, 2 * width]
        mixed = any(name.startswith(f"{prefix}mlp.experts.") for name in drafting)
        expected |= latent_attention(values, layer) | (mixture if mixed else dense_mlp)(values, layer)
        for name in ("embed_tokens.weight", "shared_head.head.weight"):  # some checkpoints carry copies
            expected |= {f"{prefix}{name}": [words, width]} if f"{prefix}{name}" in drafting else {}
    return [f"MTP: {problem}" for problem in _differences(drafting, expected)]

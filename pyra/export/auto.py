"""transformers' Auto classes for exported models: ``config.json`` of the type ``pyra`` around that of the backbone.

``AutoModelForImageClassification.from_pretrained(folder)`` returns the backbone's own class, whose tokens merge.
Nothing but the configuration and safetensors is read; ``auto_map``, which names code, is ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from pyra.errors import ExportError
from pyra.export.merged_config import MergedConfig
from pyra.files import write_json

_BACKBONE, _MERGING = "backbone", "pyra"
_FETCHED = ["config.json", "model.safetensors"]
_IGNORED = ("auto_map", "custom_pipelines", "_name_or_path", "transformers_version")
_KERNELS = ("attn_implementation", "experts_implementation")  # which may name code on the hub


class MergedForImageClassification(PreTrainedModel):
    """What the Auto class of classifiers finds for :class:`MergedConfig`; it makes models of the backbone's class."""

    config_class = MergedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """Return the exported classifier; of further arguments ``dtype`` and those that say where to find it count."""
        return _opened(pretrained_model_name_or_path, kwargs)


class MergedModel(PreTrainedModel):
    """What ``AutoModel`` finds: the backbone of the classifier, without its head."""

    config_class = MergedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """Return the backbone; arguments as of :class:`MergedForImageClassification`."""
        return _opened(pretrained_model_name_or_path, kwargs).base_model


def register() -> None:
    """Make the Auto classes know exported models."""
    AutoModel.register(MergedConfig, MergedModel, exist_ok=True)
    AutoModelForImageClassification.register(MergedConfig, MergedForImageClassification, exist_ok=True)


def save_transformers_model(model: Any, folder: Path, merging: dict[str, Any] | None) -> None:
    """Write a classifier of transformers, wrapped or not, to ``folder``."""
    inner = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED}
    inner["architectures"] = [_plain_name(model)]
    # Under the names that the modules have: transformers would write those of its earlier releases for some families.
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    config = MergedConfig(inner, merging, architectures=inner["architectures"])
    for name in ("id2label", "label2id"):
        if name in inner:
            setattr(config, name, inner[name])
    write_json(folder / "config.json", config.to_dict())


def empty_transformers_model(folder: Path, values: dict[str, Any]) -> nn.Module:
    """Make the classifier that ``config.json`` describes, with random weights.

    Raises:
        ExportError: where it describes none that transformers has.
    """
    inner = values.get(_BACKBONE) if values.get("model_type") == MergedConfig.model_type else values
    if not isinstance(inner, dict) or not isinstance(inner.get("model_type"), str):
        raise ExportError(f"{folder / 'config.json'} does not describe the model whose tokens merge")
    known = {key: value for key, value in _without_code(inner).items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(inner["model_type"], **known)
        model: nn.Module = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config.json may hold anything, and models raise what comes up
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"{folder / 'config.json'}: transformers cannot make this model ({said})") from None
    return model


def _without_code(values: Any) -> Any:
    """Return a configuration, and those in it, without what names code."""
    if not isinstance(values, dict):
        return values
    left_out = {*_IGNORED, *_KERNELS, *(f"_{name}{end}" for name in _KERNELS for end in ("", "_internal"))}
    return {key: _without_code(value) for key, value in values.items() if key not in left_out}


def _plain_name(model: Any) -> str:
    """Return the name of transformers' own class of a model."""
    return next(cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))


def _opened(name: Any, kwargs: dict[str, Any]) -> Any:
    from pyra.export.hf import load_model

    folder = Path(str(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        where = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if kwargs.get(key)}
        folder = Path(snapshot_download(str(name), allow_patterns=_FETCHED, **where))
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    return load_model(folder, dtype=None if dtype in (None, "auto") else dtype)


register()

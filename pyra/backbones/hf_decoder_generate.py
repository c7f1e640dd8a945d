"""What a decoder that merges prompts has in place of its class's ways to generate: the same, less what cannot be."""

from __future__ import annotations

import functools
from typing import Any

from pyra.errors import ConfigError


def prepare_generation(model: Any) -> None:
    """Put the ways to generate on the instance."""
    model.generate = functools.partial(generate, model)
    if hasattr(model, _CONTINUOUS):
        setattr(model, _CONTINUOUS, refuse_continuous_batching)


def restore_generation(model: Any) -> None:
    """Undo :func:`prepare_generation`."""
    for name in ("generate", _CONTINUOUS):
        model.__dict__.pop(name, None)


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model's class does, but for what merging does not go with.

    Raises:
        ConfigError: naming it.
    """
    asked = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    told = {name: kwargs.get(name, getattr(asked, name, None)) for name in _REFUSED}
    if getattr(model, "drafts_with_mtp", False):  # with hidden states that are spread again, of every token
        del told["use_mtp"]
    problems = [f"{name}={value!r}: {_REFUSED[name][1]}" for name, value in told.items() if _REFUSED[name][0](value)]
    if problems:
        raise ConfigError("a model that merges prompts does not generate so: " + "; ".join(problems))
    return type(model).generate(model, *args, **kwargs)


def refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    """Raise before a thread does, which would only log what is wrong."""
    raise ConfigError(
        "continuous batching (generate_batch) packs prompts into one row, which a model that merges prompts does not "
        "read: pad them on the left and call generate(), or unwrap the model"
    )


_CONTINUOUS = "init_continuous_batching"
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_mtp": (bool, "the layer that drafts beside merged prompts is JoyAI's (pyra.backbones.joyai); leave it out"),
    "assistant_early_exit": (bool, "the first layers alone hold another cache; leave it out"),
    "use_cache": (lambda value: value is False, "the prompt would merge anew for every token; leave it out"),
    "prefill_chunk_size": (lambda value: value is not None, "a prompt merges as a whole; leave it out"),
    "cache_implementation": (
        lambda value: value not in (None, "dynamic", "dynamic_full", "offloaded"),
        "merged prompts are kept in a dynamic cache; leave it out",
    ),
}

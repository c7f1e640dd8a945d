"""The formats of a language model: what serving engines read, and in how many bits."""

from __future__ import annotations

from dataclasses import dataclass

from pyra.errors import ConfigError, did_you_mean
from pyra.export.formats import FORMATS, need

ENGINE_FILE, GGUF_FILE = "model.safetensors", "model.gguf"

TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.05, "q8_0": 0.15}
"""Largest difference of a token's logits as a share of the largest one, by what weights are rounded to; beside INT4, by
what the floats are."""


@dataclass(frozen=True)
class LanguageFormat:
    """One way to write a language model.

    Attributes:
        name: as users give it.
        text: what it is, in a few words.
        weights: a key of :data:`TOLERANCES`, or ``int4``; None takes what the backbone's own weights are stored in.
        gguf: whether it is one GGUF file, not a folder of safetensors.
        libraries: it cannot be written without; the extra ``engines`` installs them.
    """

    name: str
    text: str
    weights: str | None = None
    gguf: bool = False
    libraries: tuple[str, ...] = ()


def _gguf(name: str, text: str, weights: str | None) -> LanguageFormat:
    return LanguageFormat(name, text, weights, True, ("gguf",))


LANGUAGE_FORMATS: dict[str, LanguageFormat] = {
    format.name: format
    for format in (
        LanguageFormat("engine", "what vLLM, SGLang and llama.cpp read, in the precision of the backbone"),
        LanguageFormat("engine-fp32", "the same in float32", "float32"),
        LanguageFormat("engine-bf16", "the same in bfloat16", "bfloat16"),
        LanguageFormat(
            "engine-int4",
            "the same in INT4 (compressed-tensors): routed experts, or a dense decoder's linear layers",
            "int4",
            libraries=("compressed_tensors",),
        ),
        _gguf("gguf", "one GGUF file for llama.cpp, in the precision of the backbone", None),
        _gguf("gguf-f32", "the same in float32", "float32"),
        _gguf("gguf-f16", "the same in float16", "float16"),
        _gguf("gguf-bf16", "the same in bfloat16", "bfloat16"),
        _gguf("gguf-q8_0", "the same in 8 bits (Q8_0), quantised by the gguf library", "q8_0"),
    )
}
"""By name."""


def language_format(name: str) -> LanguageFormat:
    """Return a format whose libraries are there.

    Raises:
        ConfigError: for a name that is none, or a missing library (names the extra to install).
    """
    if name not in LANGUAGE_FORMATS:
        known = ", ".join(LANGUAGE_FORMATS)
        if name in FORMATS:
            raise ConfigError(f"--format {name} is for image models; a language model is written as {known}")
        raise ConfigError(f"unknown --format {name!r}{did_you_mean(name, LANGUAGE_FORMATS)}; there is {known}")
    format = LANGUAGE_FORMATS[name]
    for library in format.libraries:
        need(library, f"the format {name}", "engines")
    return format

"""What merging does to a model: :class:`PyraConfig`, validated as a whole, versioned, JSON on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from pyra.attention import ATTENTIONS
from pyra.errors import ConfigError, did_you_mean
from pyra.files import write_json
from pyra.kernels.choice import BACKENDS
from pyra.matching import METHODS, ORDERS, Order
from pyra.prompt_matching import RULES
from pyra.records import record_problems
from pyra.schedule import preset_schedule

VERSION = 1
PROMPT_PRESETS = ("safe", "fast")


@dataclass(frozen=True)
class PyraConfig:
    """How a backbone's tokens are merged and re-activated.

    Exactly one of ``schedule`` and ``rate`` is given; decoders also take ``keep``, or ``preset`` alone.

    Args:
        schedule: tokens removed in each block, one entry a block.
        rate: share of the MACs to save, in [0, 1); the schedule is solved for the wrapped model.
        rate_range: lowest and highest rate that one set of weights is to serve, with a ``reactivation`` module in every
            layer that merges at any of them; :func:`pyra.set_rate` switches. None: ``rate`` or ``schedule`` alone.
        reactivation: train re-activation weights (PYRA); False merges plainly (ToMe).
        scaled_gates: divide the sum over ``r`` pairs that gates the channels (``delta_D``) by ``sqrt(r)``; False is
            the published sum, whose sigmoids start saturated where many pairs merge. Weights are trained for one.
        proportional_attention: add log(size) of the keys to the attention scores.
        matching: how pairs are found: ``"bipartite"``, the published even/odd split (ToMe, arXiv 2210.09461);
            ``"energy"``, among the tokens that have most others like them (PiToMe, arXiv 2405.16148); ``"local"``,
            neighbours on the patch grid first (told by the number of patches: the wrapped model's grid, for any other
            number a square); ``"prune"``, the tokens of ``"bipartite"`` dropped instead of merged, a
            control, without re-activation. See :func:`pyra.match_tokens`.
        order: order of the kept tokens, ``"grouped"`` as published or ``"sequence"``; ``"energy"`` and ``"local"``
            always keep the sequence.
        threshold: cosine similarity in [-1, 1] under which a token is dropped instead of merged (cf. Token Fusion,
            arXiv 2312.01026); None merges every pair. Not with ``"prune"``.
        window: largest distance, in patches, of the neighbours that ``"local"`` prefers.
        backend: what runs matching and merging: ``"auto"``, as :func:`pyra.kernels.backend` says; ``"reference"``,
            plain PyTorch; ``"triton"``, Triton kernels, or an error in the forward.
        attention: how ``log(size)`` reaches the scores: ``"auto"``, ``"fused"`` on a GPU up to 1024 tokens and
            ``"mask"`` elsewhere; ``"mask"``, the mask of ``scaled_dot_product_attention``; ``"fused"``, a kernel that
            weighs keys with their sizes, and the mask where there are gradients; ``"augmented"``, further channels of
            queries and keys, so that kernels without a mask run; ``"flex"``, a kernel that ``flex_attention``
            compiles. See :mod:`pyra.attention`.
        rule: how the prompts of a decoder become shorter: ``"importance"``, the tokens that the end of the prompt looks
            at least fold into the next that stays; ``"bipartite"``, pairs of like keys, a later token the destination;
            two controls, without re-activation: ``"drop"`` leaves out those of ``"importance"``, ``"truncate"``
            the beginning of the prompt. See :mod:`pyra.prompt_matching`.
        keep: layer of a decoder -> share of the prompt that is left after it.
        size_bias: layers of a decoder whose attention adds log(size) of the keys, or all (True) or none (False) of
            them; None: the second half. Not with ``proportional_attention=False``.
        preset: where a decoder merges: ``"safe"``, at two thirds of the depth, which needs no training; ``"fast"``, the
            earlier the higher the rate. None is ``"fast"``.

    Raises:
        ConfigError: listing every problem at once.

    Example:
        >>> PyraConfig(rate=0.5).rate
        0.5
    """

    schedule: list[int] | None = None
    rate: float | None = None
    rate_range: list[float] | None = None
    reactivation: bool = True
    scaled_gates: bool = False
    proportional_attention: bool = True
    matching: str = "bipartite"
    order: Order = "grouped"
    threshold: float | None = None
    window: int = 1
    backend: str = "auto"
    attention: str = "auto"
    rule: str = "importance"
    keep: dict[int, float] | None = None
    size_bias: list[int] | bool | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        """Check all fields together."""
        problems = []
        given = [name for name in ("schedule", "rate", "keep") if getattr(self, name) is not None]
        if len(given) != 1 and not (self.preset and not given):
            problems.append("give exactly one of schedule and rate (for a decoder: of schedule, rate and keep)")
        elif self.preset and given and given != ["rate"]:
            problems.append(f"preset says where a rate is saved, which {given[0]} says itself: give one of them")
        if self.schedule is not None:
            problems += _schedule_problems(self.schedule)
        if self.rate is not None and not (_is_number(self.rate) and 0 <= self.rate < 1):
            problems.append(f"rate must be a number in [0, 1), got {self.rate!r}")
        problems += _range_problems(self.rate_range)
        for name in ("reactivation", "scaled_gates", "proportional_attention"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        named = (
            ("matching", METHODS),
            ("order", ORDERS),
            ("backend", BACKENDS),
            ("attention", ATTENTIONS),
            ("rule", RULES),
            ("preset", PROMPT_PRESETS),
        )
        for name, allowed in named:
            value = getattr(self, name)
            if value not in allowed and (name, value) != ("preset", None):
                problems.append(
                    f"{name} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(str(value), allowed)}"
                )
        if self.threshold is not None and not (_is_number(self.threshold) and -1 <= self.threshold <= 1):
            problems.append(f"threshold must be a number in [-1, 1], got {self.threshold!r}")
        if not _is_whole(self.window) or self.window < 1:
            problems.append(f"window must be a whole number of at least 1, got {self.window!r}")
        elif self.window != 1 and self.matching != "local":
            problems.append(f"window is read by matching='local' only; this is {self.matching!r}")
        if self.matching == "prune":
            if self.threshold is not None:
                problems.append("pruning drops every chosen token: give no threshold")
            if self.reactivation is True:
                problems.append("pruning merges nothing that could be re-activated: give reactivation=False")
        if self.rule in ("drop", "truncate") and self.reactivation is True:
            problems.append(f"rule {self.rule!r} merges nothing that could be re-activated: give reactivation=False")
        problems += _keep_problems(self.keep) + _bias_problems(self.size_bias, self.proportional_attention)
        if self.scaled_gates is True and self.reactivation is False:
            problems.append("scaled_gates scales what reactivation=False leaves out")
        if self.attention in ("fused", "augmented", "flex") and not self.proportional_attention:
            problems.append(
                f"attention={self.attention!r} carries the sizes that proportional_attention=False leaves out"
            )
        if problems:
            raise ConfigError("PyraConfig: " + "; ".join(problems))
        object.__setattr__(self, "window", int(self.window))
        if self.schedule is not None:
            object.__setattr__(self, "schedule", [int(r) for r in self.schedule])
        if self.rate_range is not None:
            object.__setattr__(self, "rate_range", [float(rate) for rate in self.rate_range])
        if isinstance(self.size_bias, (list, tuple)):
            object.__setattr__(self, "size_bias", [int(layer) for layer in self.size_bias])
        if self.keep is not None:
            object.__setattr__(self, "keep", {int(layer): float(share) for layer, share in self.keep.items()})

    def decoder_options(self) -> list[str]:
        """Name the options that are given and that only decoders have."""
        found = [name for name in ("keep", "size_bias", "preset") if getattr(self, name) is not None]
        return [*found, *(["rule"] if self.rule != "importance" else [])]

    @classmethod
    def paper(cls, backbone: str, level: str) -> PyraConfig:
        """Return the configuration of the paper's experiments (arXiv 2403.09192, section 4).

        Args:
            backbone: timm name of one of the paper's models, e.g. ``vit_base_patch16_224``.
            level: ``"low"`` or ``"high"``.

        Raises:
            ScheduleError: where the paper has no such schedule.
        """
        return cls(schedule=preset_schedule(backbone, level))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, with its format version."""
        values = {"version": VERSION, **asdict(self)}
        if self.keep is not None:  # JSON has no numbers as keys
            values["keep"] = {str(layer): share for layer, share in self.keep.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PyraConfig:
        """Rebuild from :meth:`to_dict`; unknown keys and newer versions raise :class:`ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"PyraConfig: expected keys and values, found {type(values).__name__}")
        values = dict(values)
        if isinstance(values.get("keep"), dict):
            values["keep"] = {int(key) if str(key).isdecimal() else key: one for key, one in values["keep"].items()}
        version = values.pop("version", VERSION)
        problems = record_problems(cls, values)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            problems.append(f"format version {version!r} is none; this library writes {VERSION}")
        elif version > VERSION:
            problems.append(f"format version {version!r} is newer than this library's ({VERSION}): upgrade pyra-adapt")
        if problems:
            raise ConfigError("PyraConfig: " + "; ".join(problems))
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PyraConfig:
        """Read a file written by :meth:`save`; raises :class:`ConfigError` with the path where it is not one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _range_problems(rates: object) -> list[str]:
    if rates is None:
        return []
    if not isinstance(rates, (list, tuple)) or len(rates) != 2 or not all(map(_is_number, rates)):
        return [f"rate_range must be two numbers, the lowest and the highest rate, got {rates!r}"]
    lowest, highest = rates
    return [] if 0 <= lowest <= highest < 1 else [f"rate_range must rise within [0, 1), got {rates!r}"]


def _keep_problems(keep: object) -> list[str]:
    if keep is None:
        return []
    if not isinstance(keep, dict) or not keep or not all(map(_is_whole, keep)):
        return [f"keep must say which share of the prompt is left after a layer, such as {{10: 0.25}}; got {keep!r}"]
    return [
        f"keep of layer {layer} must be a share in (0, 1], got {share!r}"
        for layer, share in keep.items()
        if not (_is_number(share) and 0 < share <= 1)
    ]


def _bias_problems(layers: object, proportional: bool) -> list[str]:
    if layers is None or isinstance(layers, bool):
        told = layers is True and not proportional
    elif isinstance(layers, (list, tuple)) and all(_is_whole(layer) and layer >= 0 for layer in layers):
        told = bool(layers) and not proportional
    else:
        return [f"size_bias must be true, false or a list of layers, got {layers!r}"]
    return ["size_bias adds what proportional_attention=False leaves out"] if told else []


def _schedule_problems(schedule: object) -> list[str]:
    if not isinstance(schedule, (list, tuple)) or not schedule:
        return [f"schedule must be a list with one whole number a block, got {schedule!r}"]
    return [
        f"schedule entry {layer} must be a whole number of at least 0, got {removed!r}"
        for layer, removed in enumerate(schedule)
        if not _is_whole(removed) or removed < 0
    ]

"""What cutting experts away takes: every option with its default, checked together; the numbers that fit a model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.records import ABOVE_0, bound_problems, choice_problems, option, type_problems

FORMATS = {"deepseek_v3": "deepseek_v3", "joyai": "joyai_llm_flash"}
"""What ``config.json`` calls itself in each format; the first opens in transformers without pyra."""

_DEVICES = r"auto|cpu|cuda(:\d+)?"
_PLACES = ("task", "root", "data")


@dataclass(kw_only=True)
class CompressOptions:
    """Options of ``pyra compress-experts``."""

    backbone: str = option("", "folder of a JoyAI checkpoint, published layout or deepseek_v3, with its tokenizer")
    task: str = option("gsm8k", "language task whose experts stay, or a card file of your own")
    root: str | None = option(None, "folder with a folder of each task's files (PYRA_DATA by default)")
    data: str | None = option(None, "folder with the task's files themselves, instead of --root")
    keep: float = option(0.5, "experts of each layer that stay: a share in (0, 1], or a number such as 128")
    score: str = option(
        "reap",
        "what experts are ranked by: reap (gate times norm of what they add) or frequency (tokens they are given)",
        choices=("reap", "frequency"),
    )
    active: int | None = option(None, "experts a token is sent to; as many as before by default")
    compare_active: list[int] | None = option(  # noqa: RUF009 - a dataclass field
        None, "score the whole model with so many experts a token, too: a list such as 6,4"
    )
    baseline: bool = option(False, "score what the other ranking would keep, too")
    limit: int | None = option(512, "examples of each split that are read (a fixed draw); none for all")
    max_length: int | None = option(None, "tokens of an example, prompt and answer; longer ones are left out")
    batch_size: int = option(8, "examples a forward")
    format: str = option(
        "deepseek_v3", "deepseek_v3 (opens in transformers without pyra) or joyai", choices=(*FORMATS,)
    )
    verify: bool = option(True, "open what was written, and compare its logits with the model's")
    device: str = option("auto", "auto, cpu or cuda")
    output: str = option("runs/compressed", "folder to write to")
    overwrite: bool = option(False, "replace an earlier one in --output")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        problems = type_problems(type(self), asdict(self))
        if problems:
            raise ConfigError("; ".join(problems))
        if not self.backbone.strip():
            problems.append("--backbone is missing: give the folder of a checkpoint with its tokenizer")
        problems += choice_problems(self)
        problems += bound_problems(self, ABOVE_0, ("active", "limit", "max_length", "batch_size"))
        if not self.keep > 0 or (self.keep > 1 and self.keep != int(self.keep)):
            problems.append(f"--keep must be a share in (0, 1] or a number of experts, got {self.keep:g}")
        problems += [f"--compare-active must be above 0, got {n}" for n in self.compare_active or [] if n < 1]
        if self.root is not None and self.data is not None:
            problems.append("give --root or --data, not both")
        if re.fullmatch(_DEVICES, self.device) is None:
            problems.append(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")
        if not self.output.strip():
            problems.append("--output is empty; give a folder")
        elif Path(self.output).expanduser().resolve() == Path(self.backbone).expanduser().resolve():
            problems.append(f"--output {self.output} is the backbone itself: choose another one")
        if problems:
            raise ConfigError("; ".join(problems))

    def stored(self) -> dict[str, Any]:
        """Return what decides the outcome, as it is stored; data is found from any folder, so paths are absolute."""
        values = {name: value for name, value in asdict(self).items() if name not in ("device", "output", "overwrite")}
        values["backbone"] = Path(self.backbone).expanduser().resolve().name
        for name in _PLACES:
            path = Path(values[name]).expanduser() if values[name] else None
            if path is not None and path.exists() and (name != "task" or path.is_file()):
                values[name] = str(path.resolve())
        return values


def active_number(options: CompressOptions, config: Any) -> int:
    """Return the experts that a token will be sent to.

    Raises:
        ConfigError: for more than there were, or a comparison with more than a layer has.
    """
    before, experts = config.num_experts_per_tok, config.n_routed_experts
    if options.active is not None and options.active > before:
        raise ConfigError(f"--active {options.active}: a token is sent to {before} experts; give {before} at most")
    if many := [number for number in options.compare_active or [] if number > experts]:
        raise ConfigError(f"--compare-active {many[0]}: a layer has {experts} experts")
    return before if options.active is None else options.active


def kept_number(options: CompressOptions, config: Any) -> int:
    """Return the experts of each layer that stay.

    Raises:
        ConfigError: for a number that does not fit the model; says which do.
    """
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"--backbone {options.backbone} is quantised: give the checkpoint with the plain weights")
    if (config.first_k_dense_replace or 0) >= config.num_hidden_layers:
        raise ConfigError(
            f"--backbone {options.backbone} has no layer with experts: all {config.num_hidden_layers} are dense"
        )
    experts, groups = int(config.n_routed_experts), int(config.n_group or 1)
    active = active_number(options, config)
    number = round(options.keep * experts) if options.keep <= 1 else int(options.keep)
    open_groups = int(config.topk_group or 1)
    fitting = [
        size
        for size in range(groups, experts + 1, groups)
        if size // groups >= 2 and size // groups * open_groups >= active
    ]
    if number in fitting:
        return number
    of = "" if groups == 1 else f" in steps of {groups} (the router's groups)"
    raise ConfigError(
        f"--keep {options.keep:g} is {number} of {experts} experts a layer, {active} of which a token is sent to; what "
        f"fits: {fitting[0]} to {experts}{of}; fewer with a smaller --active"
    )

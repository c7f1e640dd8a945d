"""How a language model is adapted and trained: what every run on one has in common, checked together."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from pyra.adapters.methods import PEFT_METHODS, peft_config
from pyra.config import PROMPT_PRESETS, PyraConfig
from pyra.errors import ConfigError
from pyra.prompt_matching import RULES
from pyra.records import ABOVE_0, AT_LEAST_0, BELOW_1, SEED, bound_problems, choice_problems, option, type_problems
from pyra.tasks.options import DEVICES, MERGING, QAT, TRACKERS

_IMAGES_ALONE = ("adapter", "bottleneck", "adaptformer", "prompts", "prompts-shallow")
METHODS = {
    "pyra": "prompt tokens merge and are re-activated by trained weights, beside --peft (decoders)",
    "tome": "prompt tokens merge, or go as --rule says, beside --peft (decoders)",
    "full": "train all weights",
    **{name: text for name, text in PEFT_METHODS.items() if name not in _IMAGES_ALONE},
}
CONTROLS = ("drop", "truncate")
"""Rules that merge nothing: what merging is compared with."""


@dataclass(kw_only=True)
class AdaptationOptions:
    """How one run adapts a language model, and where it goes."""

    backbone: str = option("", "folder that transformers has saved, with its tokenizer, or a name on the hub")
    method: str = option("lora", "how to adapt: see above", choices=tuple(METHODS), metavar="NAME")
    rate: float | None = option(
        None, "with tome and pyra: share of a prompt's multiply-accumulates to save, at 1024 tokens"
    )
    keep: str | None = option(
        None, "instead: layers and the share of the prompt that is left after each, such as 8:0.5,16:0.25"
    )
    preset: str | None = option(
        None, "where prompts merge: safe (late) or fast (the earlier the higher the rate)", choices=PROMPT_PRESETS
    )
    rule: str = option("importance", "how prompts become shorter", choices=RULES, metavar="NAME")
    peft: str | None = option(None, "PEFT method beside tome and pyra: a method's name; lora by default")
    rank: int = option(8, "rank of LoRA and its kin")
    targets: str | None = option(
        None, "modules that LoRA and its kin adapt, such as q_proj,k_proj,v_proj,o_proj; PEFT's choice by default"
    )
    dropout: float = option(0.1, "dropout in the adapter")
    qat: str | None = option(
        None,
        "train as the weights will be rounded: int4, of routed experts where there are some (JoyAI), else of linear "
        "layers, with all weights or with LoRA and --dropout 0 (exported as engine-int4)",
        choices=QAT,
    )
    epochs: float = option(3.0, "passes over the training examples")
    batch_size: int = option(16, "examples a step, and a scored forward")
    lr: float | None = option(None, "peak learning rate of AdamW; by default 2e-5 (full), 3e-4 (others)")
    weight_decay: float = option(0.01, "decoupled weight decay")
    accumulate: int = option(1, "parts a step's examples are forwarded in: less memory, the same step")
    track: tuple[str, ...] = option(
        (), "trackers that must be installed (tensorboard writes into RUN/logs)", choices=TRACKERS
    )
    save_steps: int = option(500, "steps between checkpoints, besides one at the end of each epoch")
    seed: int = option(0, "random seed")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("float32", "precision of the forward", choices=("float32", "bfloat16", "float16"))
    limit: int | None = option(None, "use this many examples of each split only (a fixed draw), to try things out")
    output: str = option("runs/latest", "folder of the run")
    overwrite: bool = option(False, "replace the run in --output")
    resume: bool = option(False, "go on with what was interrupted in --output; a finished run is left as it is")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        if isinstance(self.track, list):  # from JSON
            self.track = tuple(self.track)
        problems = type_problems(type(self), {f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise ConfigError("; ".join(problems))
        if problems := self._problems():
            raise ConfigError("; ".join(problems))

    @property
    def learning_rate(self) -> float:
        """Peak learning rate: the one that was given, or that of the method."""
        return self._usual_learning_rate() if self.lr is None else self.lr

    @property
    def label(self) -> str:
        """What tables call the method: ``pyra``, ``tome``, a rule that is not importance, PEFT other than LoRA, QAT."""
        named = self.rule if self.rule in CONTROLS else self.method
        named = f"{named}-bipartite" if self.rule == "bipartite" else named
        return "+".join([named, *(more for more in (self.peft, self.qat) if more not in (None, "lora"))])

    @property
    def merges(self) -> bool:
        """Whether prompts become shorter."""
        return self.method in MERGING

    @property
    def trained(self) -> str:
        """What trains, beside merging or alone: a PEFT method's name, or ``full``, or ``linear``."""
        return (self.peft or "lora") if self.merges else self.method

    def pyra_config(self) -> PyraConfig | None:
        """Return what to merge, or None."""
        if not self.merges:
            return None
        return PyraConfig(
            rate=self.rate,
            keep=None if self.keep is None else parse_keep(self.keep),
            preset=self.preset,
            rule=self.rule,
            reactivation=self.method == "pyra",
        )

    def peft_config(self) -> Any:
        """Return the PEFT method, or None."""
        if self.trained not in PEFT_METHODS:
            return None
        targets = None if self.targets is None else [target.strip() for target in self.targets.split(",")]
        return peft_config(self.trained, self.rank, self.dropout, targets)

    def _usual_learning_rate(self) -> float:
        return 2e-5 if self.method == "full" else 3e-4

    def _has_start(self) -> bool:
        """Whether the backbone is told by something else."""
        return False

    def _problems(self) -> list[str]:
        """List what is wrong with the values, all of which have their types."""
        problems = []
        if not self.backbone.strip() and not self._has_start():
            problems.append("--backbone is missing: give a folder that transformers has saved, or a name on the hub")
        known = next(field.metadata["choices"] for field in fields(self) if field.name == "method")
        if self.method in _IMAGES_ALONE:
            problems.append(f"--method {self.method} is made for images; one of {', '.join(known)}")
        problems += choice_problems(self, leave_out=("method",) if self.method in _IMAGES_ALONE else ())
        problems += self._merging_problems(known)
        numbers = ("rank", "epochs", "batch_size", "lr", "limit", "accumulate", "save_steps")
        problems += bound_problems(self, ABOVE_0, numbers)
        problems += bound_problems(self, BELOW_1, ("dropout",))
        problems += bound_problems(self, AT_LEAST_0, ("weight_decay",))
        problems += bound_problems(self, SEED, ("seed",))
        if re.fullmatch(DEVICES, self.device) is None:
            problems.append(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")
        if not self.output.strip():
            problems.append("--output is empty; give a folder")
        return problems

    def _merging_problems(self, known: tuple[str, ...]) -> list[str]:
        given = [name for name in ("rate", "keep", "preset", "peft") if getattr(self, name) is not None]
        given += ["rule"] if self.rule != "importance" else []
        if not self.merges:
            return [
                f"--method {self.method} merges no tokens: leave --{name} out, or use tome or pyra" for name in given
            ]
        problems = []
        if not {"rate", "keep", "preset"} & set(given):
            problems.append(f"--method {self.method} needs --rate, such as 0.5 for half of a prompt's cost (or --keep)")
        if self.peft is not None and (self.peft not in PEFT_METHODS or self.peft in _IMAGES_ALONE):
            problems.append(f"--peft {self.peft} is none of {', '.join(m for m in PEFT_METHODS if m in known)}")
        if self.rate is not None and self.keep is not None:
            problems.append("--rate finds the layers that --keep names: give one of them")
        if self.method == "pyra" and self.rule in CONTROLS:
            problems.append(f"--rule {self.rule} merges nothing that could be re-activated: take --method tome")
        try:
            if not problems:
                self.pyra_config()
        except ConfigError as error:
            problems.append(str(error).removeprefix("PyraConfig: "))
        return problems


def parse_keep(text: str) -> dict[int, float]:
    """Read ``8:0.5,16:0.25``.

    Raises:
        ConfigError: for any other text.

    >>> parse_keep("8:0.5,16:0.25")
    {8: 0.5, 16: 0.25}
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(layer): float(share) for layer, share in pairs}
    except ValueError:
        raise ConfigError(f"--keep must be layers and shares such as 8:0.5,16:0.25, got {text!r}") from None

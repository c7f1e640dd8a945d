"""Options of ``pyra benchmark decoder``, checked together before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyra.config import PROMPT_PRESETS, PyraConfig
from pyra.errors import ConfigError
from pyra.prompt_matching import FIRST, LAST, RULES
from pyra.records import option
from pyra.tasks.language.adaptation import CONTROLS, parse_keep

PUBLISHED = "joyai-llm-flash"
"""What ``--backbone`` takes for the published shape of JoyAI-LLM Flash with random weights."""
STOCK = "rate 0"


@dataclass(kw_only=True)
class DecoderOptions:
    """Options of ``pyra benchmark decoder``."""

    backbone: str = option(
        "", f"folder that transformers has saved, or '{PUBLISHED}': its published shape, random weights"
    )
    layers: int | None = option(None, f"take so many layers of --backbone {PUBLISHED}")
    prompt_tokens: list[int] = field(
        default_factory=lambda: [512, 1024, 2048], metadata={"help": "tokens of a prompt, a comma list"}
    )
    rate: list[float] | None = option(  # noqa: RUF009 - a dataclass field
        None, "shares of a prompt's MACs to save, a comma list; 0,0.5,0.75 by default (0 is always measured)"
    )
    keep: str | None = option(None, "shares of a prompt that are left after layers, such as 8:0.5, in place of --rate")
    preset: str | None = option(
        None, "where prompts merge: safe (late) or fast (the earlier the higher the rate)", choices=PROMPT_PRESETS
    )
    rule: str = option("importance", "how prompts become shorter", choices=RULES)
    data: str | None = option(None, "file with text for the prompts (text or JSON lines); random tokens by default")
    new_tokens: int = option(16, "tokens of an answer, at least 2; its speed is that of all but the first")
    batch_size: int = option(1, "prompts at once")
    rounds: int = option(5, "timed turns of each; the median counts")
    memory: bool = option(True, "measure peak memory: on a CPU, each in a process of its own")
    threads: int | None = option(None, "CPU threads; all by default")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights")
    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    output: str = option("benchmark-decoder.json", "file to write the rows to")

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` with every problem."""
        problems = []
        if not self.backbone.strip():
            problems.append(f"--backbone is missing: give a folder that transformers has saved, or {PUBLISHED}")
        if self.layers is not None and self.backbone != PUBLISHED:
            problems.append(f"--layers goes with --backbone {PUBLISHED}: a folder is measured as it is")
        if self.data is not None and self.backbone == PUBLISHED:
            problems.append(f"--data needs a tokenizer, which --backbone {PUBLISHED} has not: leave it out")
        if not self.prompt_tokens or min(self.prompt_tokens) <= FIRST + LAST:
            problems.append(
                f"--prompt-tokens must be above {FIRST + LAST}: the first and the last {LAST} tokens never merge"
            )
        if self.keep is not None and self.rate is not None:
            problems.append("give --rate or --keep, not both")
        if self.keep is not None and self.preset is not None:
            problems.append("--keep says where prompts merge: leave --preset out")
        if any(not 0 <= rate < 1 for rate in self.rate or []):
            problems.append(f"--rate must be in [0, 1), got {','.join(f'{rate:g}' for rate in self.rate or [])}")
        if self.new_tokens < 2:
            problems.append(f"--new-tokens must be at least 2, got {self.new_tokens}")
        if problems:
            raise ConfigError("; ".join(problems))

    def configurations(self) -> dict[str, PyraConfig]:
        """Return what is measured beside the stock model, by name."""
        reactivation = self.rule not in CONTROLS
        if self.keep is not None:
            config = PyraConfig(keep=parse_keep(self.keep), rule=self.rule, reactivation=reactivation)
            return {f"keep {self.keep}": config}
        rates = [0.0, 0.5, 0.75] if self.rate is None else self.rate
        return {
            f"rate {rate:g}": PyraConfig(rate=rate, rule=self.rule, preset=self.preset, reactivation=reactivation)
            for rate in dict.fromkeys(rates)
            if rate
        }

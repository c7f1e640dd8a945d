"""Prefill, answers, cache and memory of a decoder that merges its prompts, against the stock model in the same run.

Timed only behind a gate: rate 0 runs the stock forward to the bit, and what ``generate`` answers from the shortened
cache is what a forward over prompt and answer says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria

from pyra.backbones import macs, wrap
from pyra.backbones.hf_decoder_cache import key_value_bytes
from pyra.config import PyraConfig
from pyra.errors import ConfigError
from pyra.tasks.benchmarks.decoder_options import PUBLISHED, STOCK, DecoderOptions
from pyra.tasks.benchmarks.decoder_subject import merging_models, model_config, prompts, sharing_copy, stock_model
from pyra.tasks.benchmarks.decoder_table import ANSWER, CACHE, FIRST_TOKEN, PEAK, PREFILL
from pyra.tasks.benchmarks.processes import in_fresh_process, peak_above_loaded
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.quiet import quiet_libraries
from pyra.tasks.timing import Spread, spread_of, spreads

PREFILL_GOAL, CACHE_GOAL = 1.6, 0.62  # at rate 0.5 and prompts of 1k to 8k tokens
_AGREE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the length of the logits
_WARM = 32  # tokens read before memory is measured
_CHECKED = 256  # tokens of the prompts that are compared


def check(models: Mapping[str, nn.Module], ids: Tensor, options: DecoderOptions) -> None:
    """Compare what is timed with what it should answer.

    Raises:
        ConfigError: where they differ; nothing is worth timing then.
    """
    stock = models[STOCK]
    with torch.inference_mode():
        if not torch.equal(wrap(sharing_copy(stock), PyraConfig(rate=0))(ids).logits, stock(ids).logits):
            raise ConfigError("at rate 0 the wrapped model does not answer as the stock model: nothing is timed")
        for name, model in models.items():
            found = _generate(model, ids, options.new_tokens, output_logits=True, return_dict_in_generate=True)
            whole = found.sequences[:, :-1]
            mask = (torch.arange(whole.shape[1], device=ids.device) < ids.shape[1]).expand_as(whole)
            told = {} if name == STOCK else {"prompt_mask": mask}
            expected = model(whole, use_cache=False, **told).logits[:, ids.shape[1] - 1 :].float()
            error = (torch.stack(found.logits, 1).float() - expected).norm() / expected.norm()
            if not error <= _AGREE[options.dtype]:
                raise ConfigError(
                    f"{name}: answers from the cache are {error:.2g} from those of one forward: nothing is timed"
                )


def decoder_rows(options: DecoderOptions) -> list[Row]:
    """Check, then measure every length of prompt."""
    models = merging_models(stock_model(options), options)
    texts, said = prompts(options, model_config(options).vocab_size)
    check(models, next(iter(texts.values()))[:, :_CHECKED], options)
    rows = []
    for tokens, ids in texts.items():
        print(f"prompts of {tokens} tokens", file=sys.stderr, flush=True)
        rows += _Case(models, ids, options, said).rows()
    return rows


@dataclass(frozen=True)
class _Case:
    """Prompts of one length, and the models that read them in turns."""

    models: Mapping[str, nn.Module]
    ids: Tensor
    options: DecoderOptions
    said: str

    def rows(self) -> list[Row]:
        """Return five rows a model: three times, and two sizes."""
        jobs = {name: partial(_prefill, model, self.ids) for name, model in self.models.items()}
        measured = {PREFILL: spreads(jobs, self.options.rounds, device=self.options.device)}
        measured |= self._answers()
        measured[CACHE] = {name: _once(key_value_bytes(job().past_key_values)) for name, job in jobs.items()}
        if self.options.memory:
            measured[PEAK] = {name: _once(self._peak(name)) for name in self.models}
        return [self._row(name, what, found) for name in self.models for what, found in measured.items()]

    def _answers(self) -> dict[str, dict[str, Spread]]:
        """Time the first token of an answer, and how many a second follow."""
        first: dict[str, list[float]] = {name: [] for name in self.models}
        speed: dict[str, list[float]] = {name: [] for name in self.models}
        for turn in range(1 + self.options.rounds):
            for name, model in self.models.items():
                clock = _Clock(self.options.device)
                _generate(model, self.ids, self.options.new_tokens, stopping_criteria=[clock])
                if turn:  # the first one warms up
                    first[name].append(clock.stamps[1] - clock.stamps[0])
                    rest = clock.stamps[-1] - clock.stamps[1]
                    speed[name].append(len(self.ids) * (len(clock.stamps) - 2) / rest)
        return {
            FIRST_TOKEN: {name: spread_of(values) for name, values in first.items()},
            ANSWER: {name: spread_of(values) for name, values in speed.items()},
        }

    def _peak(self, name: str) -> int:
        if torch.device(self.options.device).type == "cuda":  # which may not hold the weights twice
            return peak_above_loaded(partial(_prefill, self.models[name], self.ids), self.options.device)
        return in_fresh_process(_peak_of, self.options, name, self.ids.tolist())

    def _row(self, name: str, what: str, found: Mapping[str, Spread]) -> Row:
        scale, unit = _UNITS[what]
        held, stock = found[name], found[STOCK]
        ratio = stock.p50 / held.p50 if unit == "ms" else held.p50 / max(stock.p50, 1)
        tokens = self.ids.shape[1]
        goal = _GOALS.get(what) if self._promised(name) else None
        saved = macs(self.models[STOCK], input_size=tokens) / macs(self.models[name], input_size=tokens)
        share = " share" if what in (CACHE, PEAK) else ""
        return Row(
            measured=f"{what}, {tokens} tokens",
            implementation=name
            if self.options.rule == "importance" or name == STOCK
            else f"{name}, {self.options.rule}",
            backbone=shown(self.options),
            image_size=0,
            batch_size=len(self.ids),
            dtype=self.options.dtype,
            unit=unit,
            **{key: scale * value for key, value in held._asdict().items()},
            ratios={} if name == STOCK else {f"{STOCK}{share}": ratio},
            goal=goal,
            reached=None if goal is None else ratio <= goal if share else ratio >= goal,
            detail=f"MACs ratio {saved:.2f}; {self.said}" if what == PREFILL else "",
        )

    def _promised(self, name: str) -> bool:
        plain = self.options.rule == "importance" and self.options.preset is None
        return name == "rate 0.5" and plain and 1000 <= self.ids.shape[1] <= 8192


_UNITS = {
    PREFILL: (1e3, "ms"),
    FIRST_TOKEN: (1e3, "ms"),
    ANSWER: (1.0, "tokens/s"),
    CACHE: (1e-6, "MB"),
    PEAK: (1e-6, "MB"),
}
_GOALS = {PREFILL: PREFILL_GOAL, CACHE: CACHE_GOAL}


class _Clock(StoppingCriteria):
    """Stops nothing; notes when it is made and when each token is there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stamps: list[float] = []
        self._note()

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Note a token."""
        self._note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _note(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stamps.append(time.perf_counter())


def _prefill(model: Any, ids: Tensor) -> Any:
    with torch.inference_mode():
        return model(ids, use_cache=True, logits_to_keep=1)


def _generate(model: Any, ids: Tensor, count: int, **told: Any) -> Any:
    asked = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked, **told)


def _once(value: float) -> Spread:
    return Spread(*3 * (float(value),))


def _peak_of(options: DecoderOptions, name: str, ids: list[list[int]]) -> int:
    quiet_libraries()
    model, tokens = merging_models(stock_model(options), options)[name], torch.tensor(ids)
    _prefill(model, tokens[:, :_WARM])  # weights are in memory, libraries have started
    return peak_above_loaded(partial(_prefill, model, tokens), options.device)


def shown(options: DecoderOptions) -> str:
    """Return what rows call the backbone."""
    if options.layers is not None:
        return f"{options.backbone}, {options.layers} layers"
    return options.backbone if options.backbone == PUBLISHED else Path(options.backbone).name

"""Decoding in which an MTP layer drafts tokens and the decoder verifies all of them in one forward.

transformers' assisted decoding verifies, samples (speculative sampling, arXiv 2211.17192, algorithm 1, whose tokens are
distributed as without drafts), stops and cuts the cache; here is what drafts. One layer drafts any number of tokens: it
reads its own output as the hidden state of the token that it has just drafted (DeepSeek-V3's report, arXiv 2412.19437,
section 2.2, has a layer for each; engines that serve such a model with one layer go on like this).

Letters: ``B`` batch (1 here), ``N`` tokens, ``C`` channels, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator

from pyra.errors import ConfigError

_TOKENS, _RECORD = "mtp_draft_tokens", "mtp_record"


@dataclass
class DraftRecord:
    """What became of drafts: ``generate(use_mtp=True, mtp_record=DraftRecord())`` fills it in.

    Attributes:
        drafted: tokens of each draft that was verified.
        accepted: how many of them are part of the answer, the first ones.

    >>> DraftRecord(drafted=[3, 3], accepted=[3, 1]).acceptance_length
    3.0
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 where none was drafted."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of the answer that a verification gives: the accepted ones and the decoder's own after them."""
        return 1 + sum(self.accepted) / max(len(self.accepted), 1)


class DraftsWithMtp:
    """Modifications: ``generate(use_mtp=True)`` drafts here, ``save_pretrained`` writes an attached layer.

    ``generate`` takes besides: ``mtp_draft_tokens``, tokens of a draft (1 by default), which may also stand in the
    generation configuration, and ``mtp_record``, a :class:`DraftRecord`.
    """

    drafts_with_mtp = True

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> Any:
        """Keep what transformers has no field for, and refuse what does not go with drafts, before anything runs."""
        given = {name: kwargs.pop(name, None) for name in (_TOKENS, _RECORD)}
        own = {name: value for name, value in given.items() if value is not None}
        prepared, rest = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        for name, value in own.items():
            setattr(prepared, name, value)
        if prepared.use_mtp not in (None, True, False):
            raise ConfigError(f"use_mtp must be True or False, got {prepared.use_mtp!r}")
        if prepared.use_mtp:
            _check(self, prepared, rest.get("past_key_values"))
            if rest.get("inputs_embeds") is not None:
                raise ConfigError("use_mtp=True drafts behind token ids: give input_ids in place of inputs_embeds")
        elif own:
            raise ConfigError(f"{' and '.join(sorted(own))}: say use_mtp=True, too, or leave it out")
        return prepared, rest

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse criteria of one's own: they would see the end of an accepted draft alone, and stop later."""
        if generation_config.use_mtp and stopping_criteria:
            raise ConfigError("use_mtp=True does not go with stopping_criteria: leave one of them out")
        return super()._get_stopping_criteria(  # type: ignore[misc]
            generation_config, stopping_criteria, *args, **kwargs
        )

    def _get_candidate_generator(self, generation_config: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        """Make what drafts."""
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(  # type: ignore[misc]
                generation_config=generation_config, input_ids=input_ids, **kwargs
            )
        if len(input_ids) != 1:
            raise ConfigError(
                f"use_mtp=True answers one prompt at a time, got {len(input_ids)}: rows would accept different numbers "
                "of tokens; call generate for each, or leave it out"
            )
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        if mask is not None and not mask.any():
            raise ConfigError("attention_mask hides the whole prompt, and use_mtp=True drafts behind it: keep a token")
        return MtpCandidates(self, _layer(self), generation_config, kwargs.get("logits_processor"))

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Write the model, with an attached MTP layer as checkpoints have it; the configuration says whether there is.

        Raises:
            ConfigError: for an attached layer beside quantised weights, which transformers writes on its own.
        """
        from pyra.backbones.joyai_mtp_weights import mtp_weights, without_mtp

        model: Any = self
        if model.mtp is not None and getattr(model, "hf_quantizer", None) is not None:
            raise ConfigError("the model is quantised, and its MTP layer would be lost: detach_mtp(model) comes first")
        if model.mtp is not None:
            state = model.state_dict() if state_dict is None else state_dict
            state_dict = {**without_mtp(state), **mtp_weights(model, state)}
        before = model.config.num_nextn_predict_layers
        model.config.num_nextn_predict_layers = int(model.mtp is not None)
        try:
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
        finally:
            model.config.num_nextn_predict_layers = before


class MtpCandidates(CandidateGenerator):
    """Drafts with one MTP layer.

    The layer's cache holds a position a token whose hidden state the decoder has computed; what it adds while it reads
    its own output is cut off after each draft.

    Args:
        model: JoyAI.
        layer: that drafts.
        asked: the generation configuration.
        processors: of logits, which drafts are chosen by as tokens are.
    """

    requires_model_outputs = True

    def __init__(self, model: Any, layer: Any, asked: Any, processors: Any) -> None:
        self.model, self.layer, self.asked, self.processors = model, layer, asked, processors
        self.model_kwargs_overrides = {"output_hidden_states": -1}  # the last one, behind the final norm
        self.count = getattr(asked, _TOKENS, None) or 1
        self.record: DraftRecord = getattr(asked, _RECORD, None) or DraftRecord()
        self.cache = DynamicCache()
        self.drafted = 0

    def get_candidates(self, input_ids: Tensor, **told: Any) -> tuple[Tensor, Tensor | None]:
        """Return ``input_ids`` [1, N] with a draft behind them, and the logits [1, k, V] it was chosen by."""
        self.drafted = 0
        if told["is_first_iteration"]:  # the prompt has not been read
            return input_ids, None
        hidden: Tensor = told["model_outputs"].hidden_states[-1]
        fresh = told["n_last_matches"] + 1 if self.cache.get_seq_length() else hidden.shape[1]
        hidden, ids = hidden[:, :fresh], input_ids[:, -fresh:]
        attended = told["model_kwargs"].get("attention_mask")
        if attended is not None:
            real = attended[0, -fresh - 1 : -1].bool()
            hidden, ids = hidden[:, real.to(hidden.device)], ids[:, real.to(ids.device)]
        count = min(self.count, self.asked.max_length - input_ids.shape[1] - 1)
        if count < 1:
            return input_ids, None
        self.drafted = count
        return self._draft(hidden, ids, input_ids, count)

    def _draft(self, hidden: Tensor, ids: Tensor, whole: Tensor, count: int) -> tuple[Tensor, Tensor]:
        from pyra.backbones.joyai_mtp import mtp_logits, mtp_states

        told = []
        for _ in range(count):
            hidden = mtp_states(self.model, self.layer, hidden, ids, cache=self.cache)[:, -1:]
            logits = mtp_logits(self.model, hidden[:, -1]).to(whole.device)
            if self.processors:
                logits = self.processors(whole, logits)
            sampled = self.asked.do_sample
            ids = torch.multinomial(logits.softmax(-1), 1) if sampled else logits.argmax(-1, keepdim=True)
            whole = torch.cat([whole, ids], dim=1)
            told.append(logits)
        self.cache.crop(-(count - 1))
        return whole, torch.stack(told, dim=1)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: Any) -> None:
        """Note what became of the last draft."""
        if self.drafted:
            self.record.drafted.append(self.drafted)
            self.record.accepted.append(int(num_matches))


def _check(model: Any, asked: Any, cache: Any) -> None:
    """Raise :class:`ConfigError` for a model that cannot draft, or options that do not go with it."""
    count, record = getattr(asked, _TOKENS, None), getattr(asked, _RECORD, None)
    if count is not None and (type(count) is not int or count < 1):
        raise ConfigError(f"{_TOKENS} must be a whole number from 1 on, got {count!r}")
    if record is not None and not isinstance(record, DraftRecord):
        raise ConfigError(f"{_RECORD} must be a DraftRecord, got {type(record).__name__}")
    found = {name: getattr(asked, name, None) for name in _REFUSED}
    problems = [f"{name}={found[name]!r}" for name, wrong in _REFUSED.items() if wrong(found[name])]
    if problems:
        raise ConfigError(f"use_mtp=True does not go with {', '.join(problems)}: leave one of them out")
    if cache is not None and cache.get_seq_length():
        raise ConfigError(  # transformers' assisted decoding would read the whole prompt behind what the cache holds
            f"use_mtp=True begins with an empty cache, this one holds {cache.get_seq_length()} tokens: leave "
            "past_key_values out, or use_mtp"
        )
    _refuse_missing(model)


_REFUSED: dict[str, Any] = {
    "num_beams": lambda value: (value or 1) > 1,
    "num_return_sequences": lambda value: (value or 1) > 1,
    "guidance_scale": lambda value: value not in (None, 1),  # keeps a cache of its own, which drafts would spoil
    "prompt_lookup_num_tokens": lambda value: value is not None,
    "assistant_early_exit": lambda value: value is not None,
    "stop_strings": bool,  # looked for at the end of an accepted draft alone
    "output_hidden_states": bool,
    "output_attentions": bool,
    "use_cache": lambda value: value is False,
    "cache_implementation": lambda value: value not in (None, "dynamic", "dynamic_full", "offloaded"),
}


def _refuse_missing(model: Any) -> None:
    """Raise :class:`ConfigError` where a layer is neither attached nor in the model's folder."""
    from pyra.backbones.joyai_folder import check_checkpoint

    name = model.config.name_or_path
    is_folder = bool(name) and Path(name).expanduser().is_dir()
    if model.mtp is None and not (is_folder and check_checkpoint(name).mtp):
        looked = f"its folder {name} holds none" if is_folder else "it comes from no folder that could hold one"
        raise ConfigError(
            f"use_mtp=True: the model has no MTP layer, and {looked}: attach_mtp(model, FOLDER) reads one, "
            "python -m pyra.scripts.train_mtp trains one; or leave it out"
        )


def _layer(model: Any) -> nn.Module:
    """Return the layer that drafts; one that is not attached is read for this call."""
    from pyra.backbones.joyai_mtp import read_layer

    layer: nn.Module = read_layer(model, model.config.name_or_path).eval() if model.mtp is None else model.mtp
    return layer

"""Where the prompts of a forward end, told before a decoder runs; what cannot be merged is refused here.

A completion must never merge: its labels would, and its tokens would learn of their future. So a forward says where
each prompt ends, by ``prompt_mask``, by labels (the first that counts begins the completion), or as ``generate`` does,
which asks for the logits of the last tokens alone.

All functions of this module are hooks on the instance and hold nothing between forwards.

Letters: ``B`` batch, ``N`` tokens.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from pyra.backbones.hf_decoder_cache import prepare_cache, remembers
from pyra.backbones.hf_decoder_stream import PromptStream, Tokens
from pyra.backbones.layers import MergingLayer
from pyra.errors import ConfigError
from pyra.prompt_matching import FIRST, LAST

_IGNORED = -100  # label of a token that no loss is taken of
_HOW_TO_TELL = (
    "this model merges the tokens of prompts, and this forward does not say where they end: give prompt_mask=[B, N] "
    "(true on the prompt), labels that are -100 on the prompt (Trainer's label smoothing and compute_loss_func keep "
    "labels from the model), or call generate(); pyra.unwrap(model) or rate 0 runs it as it was"
)


def tell_prompt(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Find the prompt mask that a model with a head is given to understand (a forward pre-hook)."""
    given = _named(model, args, kwargs)
    labels, keep, mask = given.get("labels"), given.get("logits_to_keep", 0), given.get("prompt_mask")
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    past = given.get("past_key_values")
    if not isinstance(tokens, Tensor) or (isinstance(past, Cache) and past.get_seq_length()):
        return (), given
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape == tokens.shape[:2]:
        counts = labels != _IGNORED
        if mask is None:
            given["prompt_mask"] = _before_labels(counts, given.get("attention_mask"))
        elif (torch.as_tensor(mask, device=counts.device).bool() & counts).any():
            raise ConfigError("prompt_mask covers labels that count: what is learnt or scored must not merge")
    elif mask is None and _classifies(model):
        given["prompt_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    elif mask is None and type(keep) is int and keep > 0 and (given.get("use_cache") or past is not None):
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask[:, : tokens.shape[1] - keep + 1] = True
        given["prompt_mask"] = mask
    return (), given


def _classifies(model: nn.Module) -> bool:
    """Whether a head reads one token of a whole text: all of it is a prompt then."""
    return hasattr(model, "score")


def _before_labels(counts: Tensor, attended: Any) -> Tensor:
    """Return the tokens [B, N] before the first label that counts; of a row without one, all."""
    before: Tensor = counts.cumsum(1) == 0
    present = before if not isinstance(attended, Tensor) or attended.ndim != 2 else attended.bool()
    empty = ~(before & present).any(1)
    if bool(empty.all()):
        raise ConfigError(
            "no label is -100, so there is no prompt that could merge: give labels that are -100 on the prompt (of "
            "trl's SFTTrainer: prompts and completions, or completion_only_loss=True), or give prompt_mask"
        )
    return before


def tell_layers(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Check a forward of the decoder, and tell its layers what they need (a forward pre-hook)."""
    given = _named(core, args, kwargs)
    mask = given.pop("prompt_mask", None)
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        return (), given  # the model itself says what is missing
    first, depth = _merging_span(core)
    if first is None:
        return (), given
    cache, attended = given.get("past_key_values"), given.get("attention_mask")
    if isinstance(attended, Tensor) and attended.ndim != 2:
        raise ConfigError(f"merging takes an attention mask [B, N], this one is {list(attended.shape)}")
    if cache is not None and not isinstance(cache, Cache):
        raise ConfigError(f"past_key_values must be a Cache of transformers, got {type(cache).__name__}")
    routed = given.get("output_router_logits")
    if getattr(core.config, "output_router_logits", False) if routed is None else routed:
        raise ConfigError(
            "output_router_logits: the loss that is taken of them expects a row a token, and merged tokens have none "
            "of their own; leave it out"
        )
    present = _present(attended, tokens)
    if cache is not None and cache.get_seq_length():
        _refuse_foreign(cache, mask, first, depth)
        padded = tokens.shape[1] > 1 and not bool(present.all())
        given["pyra_tokens"] = Tokens(present, padded=padded)
        return (), given
    if mask is None:
        raise ConfigError(_HOW_TO_TELL)
    if isinstance(attended, Tensor) and attended.shape[1] != tokens.shape[1]:
        raise ConfigError(
            f"the attention mask is of {attended.shape[1]} tokens, the input of {tokens.shape[1]}: merging takes whole "
            "prompts, without tokens that were read before"
        )
    given["pyra_tokens"] = _told(mask, present, tokens, given.get("position_ids"))
    if cache is None and _caches(core, given):
        cache = given["past_key_values"] = DynamicCache(config=core.config)
    if cache is not None:
        prepare_cache(cache, first, depth)
    return (), given


def spread_hidden_states(_core: nn.Module, _inputs: Any, output: Any) -> Any:
    """Spread every recorded stream in a decoder's output (a forward hook)."""
    if isinstance(output, tuple):
        return tuple(_spread(value) for value in output)
    if getattr(output, "hidden_states", None) is not None:
        output["hidden_states"] = _spread(output["hidden_states"])
    return output


def _spread(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_spread(item) for item in value)
    return value.spread() if isinstance(value, PromptStream) else value


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _merging_span(core: Any) -> tuple[int | None, int]:
    """Return the first layer that merges, and how many there are."""
    merging = (layer.step.layer for layer in core.layers if isinstance(layer, MergingLayer) and layer.step.removed)
    first = next(merging, None)
    return first, len(core.layers)


def _present(attended: Any, tokens: Tensor) -> Tensor:
    if isinstance(attended, Tensor):
        return attended[:, -tokens.shape[1] :].bool().to(tokens.device)
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _refuse_foreign(cache: Cache, mask: Any, first: int, depth: int) -> None:
    if not remembers(cache, first, depth):
        raise ConfigError(
            "the cache holds tokens that this model has not read as it merges (a shared prefix, prefix tuning, chunks "
            "of a prompt): give it the whole prompt and an empty cache"
        )
    if mask is not None:
        raise ConfigError("prompt_mask goes with an empty cache: what follows a prompt does not merge")


def _told(mask: Any, present: Tensor, tokens: Tensor, positions: Any) -> Tokens:
    """Check a prompt mask; all that is looked at on the device is fetched at once."""
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(f"prompt_mask must be a tensor [B, N] = {list(tokens.shape[:2])}, got {found}")
    prompt = mask.to(tokens.device).bool() & present
    places = torch.arange(1, prompt.shape[1] + 1, device=prompt.device)
    lengths, end = prompt.sum(1), (prompt * places).amax(1)
    start = end - lengths
    inside = (places > start[:, None]) & (places <= end[:, None])
    holes = (inside & ~prompt).any()
    before = (present & (places <= start[:, None]) & (lengths > 0)[:, None]).any()
    jumps = holes.new_zeros(())
    if isinstance(positions, Tensor):
        pairs = present[:, 1:] & present[:, :-1]
        jumps = (pairs & (positions.diff(dim=-1) != 1)).any()
    facts = torch.stack([holes.long(), before.long(), jumps.long(), end.max(), lengths.min(), (~present).any().long()])
    hole, earlier, jump, reach, shortest, padded = facts.tolist()
    if jump:
        raise ConfigError(
            "position_ids begin anew within a row, as of packed sequences: merging takes one sequence a row (pad "
            "instead of packing: packing=False, padding_free=False)"
        )
    if hole or earlier:
        raise ConfigError(
            "prompt_mask must be true on one run of tokens a row, from its first token on, and a prompt must hold no "
            "padding"
        )
    if shortest <= FIRST + LAST:
        warnings.warn(
            f"prompts of at most {FIRST + LAST} tokens stay as they are: the first and the last {LAST} never merge",
            stacklevel=2,
        )
    return Tokens(present, prompt, lengths, bool(padded), tokens.shape[1] - reach)


def _caches(core: Any, given: dict[str, Any]) -> bool:
    asked = given.get("use_cache")
    return bool(core.config.use_cache if asked is None else asked) and not (core.training and _checkpoints(core))


def _checkpoints(core: Any) -> bool:
    return bool(getattr(core, "gradient_checkpointing", False))

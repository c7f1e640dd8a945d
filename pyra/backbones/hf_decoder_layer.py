"""A decoder's layer that merges prompts, or stands behind one that does.

No attention code is copied: :class:`AttentionReader` runs the module's own forward and stands between it and the
attention function, where queries and keys are seen and the sizes of keys join the scores.

Letters: ``B`` batch, ``N`` tokens now, ``N0`` tokens at the first layer, ``K`` keys, ``C`` channels, ``H`` heads.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyra.attention import augmented
from pyra.backbones.hf_decoder_cache import PromptLayer
from pyra.backbones.layers import KeyReader, MergingLayer, refuse_reentrant
from pyra.merging import spread
from pyra.prompt_matching import LAST, PromptPlan, match_prompt, prompt_importance, prompt_pairs, tokens_to_remove
from pyra.prompt_merging import merge_prompt

ATTENTION = "pyra_prompt"
"""Name of the attention function that is read, in transformers' registry."""
_MASKED = ("sdpa", "eager")  # attention functions that take an additive mask


@dataclass(frozen=True)
class Tokens:
    """What the layers are told of the tokens of a forward.

    Attributes:
        present: [B, N] true on what is no padding.
        prompt: [B, N] true on prompts that are to merge; None where a prompt was read before.
        lengths: [B] tokens of the prompts.
        padded: whether there is padding.
        after: tokens that stand behind the longest-reaching prompt of the batch.
    """

    present: Tensor
    prompt: Tensor | None = None
    lengths: Tensor | None = None
    padded: bool = False
    after: int = 0


@dataclass(frozen=True)
class Seen:
    """What the attention of the layers up to the next merge is given.

    Attributes:
        mask: what transformers makes for the attention function.
        rotary: cosines and sines of the tokens that are left.
        size: [B, K] words of each key.
        bias: [B, 1, 1, K] their logarithm, float32; 0 for padding, which the mask leaves out. None where no layer
            adds it.
    """

    mask: Any
    rotary: Any
    size: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class PromptStream:
    """What passes between layers behind a merge.

    Attributes:
        tokens: [B, N, C].
        size: [B, N, 1] int32 words each token stands for, 0 for padding.
        places: [B, N] place of each token among the original ones; a merged token has that of its destination.
        prompt: [B, N] true on what is left of the prompts.
        gone: [B] tokens that each prompt has lost.
        padded: whether there is padding.
        source_map: [B, N0] row that holds each original token; None while that is its own.
        seen: None until a layer has made it.
    """

    tokens: Tensor
    size: Tensor
    places: Tensor | None = None
    prompt: Tensor | None = None
    gone: Tensor | None = None
    padded: bool = False
    source_map: Tensor | None = None
    seen: Seen | None = None

    def spread(self) -> Tensor:
        """Return [B, N0, C]: for each original token the one that holds it."""
        return self.tokens if self.source_map is None else spread(self.tokens, self.source_map)


class MergingDecoderLayer(MergingLayer):
    """Modifications against the layer it stands for: takes tokens or a stream, merges, adds the size bias."""

    def forward(
        self,
        hidden_states: Tensor | PromptStream,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        pyra_tokens: Tokens | None = None,
        **kwargs: Any,
    ) -> Tensor | PromptStream:
        """Run one layer."""
        refuse_reentrant(self)
        stream = None if isinstance(hidden_states, Tensor) else hidden_states
        tokens: Tensor = hidden_states if isinstance(hidden_states, Tensor) else hidden_states.tokens
        merging = self.merges and pyra_tokens is not None and pyra_tokens.prompt is not None
        bias = None
        if stream is not None and pyra_tokens is not None:
            stream = self._with_seen(stream, pyra_tokens, past_key_values, position_embeddings)
            assert stream.seen is not None
            attention_mask, position_embeddings = stream.seen.mask, stream.seen.rotary
            position_ids = None  # with gaps in it, flash attention would take one sequence for several
            bias = stream.seen.bias if self.step.layer in self.biased else None
        attention: Any = self.self_attn
        if merging or bias is not None:
            attention = AttentionReader(self.self_attn, bias, keep=merging)  # type: ignore[arg-type]
        attended, *_ = attention(
            hidden_states=self.input_layernorm(tokens),  # type: ignore[operator]
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        tokens = tokens + attended
        if self.merges and pyra_tokens is not None:
            stream = self._merged(stream, tokens, attention, pyra_tokens)
            tokens = stream.tokens
        tokens = tokens + self.mlp(self.post_attention_layernorm(tokens))  # type: ignore[operator]
        if stream is None:
            return tokens
        stream = replace(stream, tokens=tokens)
        return stream.spread() if self.step.last else stream

    @property
    def merges(self) -> bool:
        """Whether prompts merge here."""
        return self.step.removed > 0

    @property
    def biased(self) -> tuple[int, ...]:
        """Layers whose attention adds the logarithm of the sizes of keys."""
        return biased_layers(self.step.config, self.step.depth)

    def _with_seen(self, stream: PromptStream, told: Tokens, cache: Cache | None, rotary: Any) -> PromptStream:
        """Note sizes in the cache, and make what the attention is given where no layer has."""
        held = None if cache is None else cache.layers[self.step.layer]
        assert held is None or isinstance(held, PromptLayer)
        size = stream.size[..., 0]
        if held is not None and told.prompt is not None:
            held.remember(size, stream.padded, max(size.shape[1] - told.after - LAST + 1, 0))
        elif held is not None and stream.seen is not None:
            held.follow(stream.seen.size, told.padded)
        elif held is not None:
            held.extend(told.present, told.padded)
        if stream.seen is not None:
            return stream
        padded = stream.padded
        if held is not None:
            assert held.size is not None
            size, padded = held.size, held.padded
        mask = create_causal_mask(
            config=self.self_attn.config,  # type: ignore[union-attr]
            inputs_embeds=stream.tokens,
            attention_mask=(size > 0) if padded else None,
            past_key_values=None if held is None else Cache(layers=[held]),
        )
        if stream.places is not None:
            one = isinstance(rotary, Tensor)  # DeepSeek-V2's complex table
            rotary = _rows(rotary, stream.places) if one else tuple(_rows(table, stream.places) for table in rotary)
        bias = size.clamp(min=1).log()[:, None, None] if self.biased else None
        return replace(stream, seen=Seen(mask, rotary, size, bias))

    def _merged(
        self, stream: PromptStream | None, tokens: Tensor, attention: AttentionReader, told: Tokens
    ) -> PromptStream:
        if told.prompt is None:  # of a prompt that was read before
            return PromptStream(tokens, told.present.to(torch.int32).unsqueeze(-1), padded=told.padded)
        assert told.lengths is not None
        if stream is None:
            size = told.present.to(torch.int32).unsqueeze(-1)
            places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
            stream = PromptStream(tokens, size, places, told.prompt, torch.zeros_like(told.lengths), told.padded)
        plan = self._plan(stream, attention, told.lengths)
        weights = getattr(self, "reactivation", None) if self.step.config.reactivation else None
        if not plan.plan.removed and not plan.front:
            return replace(stream, tokens=_with_gradients(tokens, weights))
        tokens, size = merge_prompt(tokens, stream.size, plan, weights)
        map_of = plan.plan.source_map()
        assert stream.places is not None and stream.prompt is not None and stream.gone is not None
        before = stream.source_map
        source_map = map_of[:, plan.front :] if before is None else map_of.gather(1, before + plan.front)
        return PromptStream(
            tokens,
            size,
            plan.gather(stream.places),
            plan.gather(stream.prompt.to(torch.int32)).bool(),
            stream.gone + plan.removed,
            (stream.padded or plan.front > 0) and bool((size == 0).any()),
            source_map,
        )

    @torch.no_grad()
    def _plan(self, stream: PromptStream, attention: AttentionReader, lengths: Tensor) -> PromptPlan:
        rule = self.step.config.rule
        assert stream.prompt is not None and stream.gone is not None
        query, key = attention.queries_and_keys()
        removed = tokens_to_remove(lengths, self.step.share, gone=stream.gone, halving=rule == "bipartite")
        partner = None
        if rule == "bipartite":
            scores, partner = prompt_pairs(key, stream.prompt)
        elif rule == "truncate":
            scores = torch.zeros_like(stream.prompt, dtype=torch.float32)
        else:
            size = stream.size if self.step.layer in self.biased else None
            scale: float = self.self_attn.scaling  # type: ignore[union-attr, assignment]
            scores = prompt_importance(query, key, stream.prompt, scale, size=size)
        padding = stream.size[..., 0] == 0
        return match_prompt(scores, stream.prompt, padding, removed, rule=rule, partner=partner)

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        return f"keep={self.step.share:.3f}" if self.merges else ""


class AttentionReader(KeyReader):
    """Stands in for an attention module during one call, between it and the attention function that it looks up.

    Args:
        attention: of transformers.
        bias: [B, 1, 1, K] that joins the scores; None adds nothing.
        keep: keep queries and keys.
    """

    def __init__(self, attention: nn.Module, bias: Tensor | None, keep: bool) -> None:
        super().__init__(attention)
        self.config = _ReadConfig(attention.config)
        self._bias, self._wanted = bias, keep
        self._read: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Run the module's attention function; arguments as transformers gives them."""
        if self._wanted:
            self._read = query, key
        name: str = self.config.read._attn_implementation
        eager = getattr(sys.modules[type(self._attention).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        bias = self._bias
        if bias is None:
            return run(self, query, key, value, mask, **kwargs)
        if name in _MASKED and (mask is not None or query.shape[2] == 1):
            return run(self, query, key, value, _biased(mask, bias.to(query.dtype)), **kwargs)
        query, key, wide = augmented(query, key, value, bias, kwargs["scaling"])
        mixed, *rest = run(self, query, key, wide, mask, **kwargs)
        return mixed[..., : value.shape[-1]], *rest

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Return those of the call, rotated: [B, H, N, d] and [B, G, N, d]."""
        if self._read is None:
            raise RuntimeError(f"{type(self._attention).__name__} does not look its attention function up")
        return self._read


class _ReadConfig:
    """The configuration of an attention, but for the attention function that it names."""

    _attn_implementation = ATTENTION

    def __init__(self, config: Any) -> None:
        self.read = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.read, name)


def _attend(module: AttentionReader, *args: Any, **kwargs: Any) -> Any:
    return module.attend(*args, **kwargs)


AttentionInterface.register(ATTENTION, _attend)


def biased_layers(config: Any, depth: int) -> tuple[int, ...]:
    """Return the layers whose attention adds the logarithm of the sizes of keys.

    Without a word in the configuration: those of the second half, in which it helped (the others it hurt).
    """
    if not config.proportional_attention:
        return ()
    if isinstance(config.size_bias, bool):
        return tuple(range(depth)) if config.size_bias else ()
    if config.size_bias is None:
        return tuple(range(math.ceil(depth / 2), depth))
    return tuple(config.size_bias)


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _with_gradients(tokens: Tensor, weights: nn.Module | None) -> Tensor:
    """Give weights that a forward has no use for gradients of zero: data parallel training waits for them."""
    if weights is None or not (weights.training and torch.is_grad_enabled()):
        return tokens
    return tokens + sum(parameter.sum() for parameter in weights.parameters()).to(tokens) * 0  # type: ignore[union-attr]


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """Pick rows [B, N, d] of a rotary table [1 or B, N0, d]."""
    if table.shape[0] == 1:
        return F.embedding(places, table[0])
    return table.gather(1, places.unsqueeze(-1).expand(*places.shape, table.shape[-1]))

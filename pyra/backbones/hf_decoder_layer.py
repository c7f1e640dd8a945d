"""A decoder's layer that merges prompts, or stands behind one that does.

Letters: ``B`` batch, ``N`` tokens now, ``N0`` tokens at the first layer, ``K`` keys, ``C`` channels, ``H`` heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from pyra.backbones.hf_decoder_attention import AttentionReader, biased_layers
from pyra.backbones.hf_decoder_cache import PromptLayer
from pyra.backbones.hf_decoder_stream import PromptStream, Seen, Tokens
from pyra.backbones.layers import MergingLayer, refuse_reentrant
from pyra.prompt_matching import LAST, PromptPlan, match_prompt, prompt_importance, prompt_pairs, tokens_to_remove
from pyra.prompt_merging import merge_prompt


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

"""The layer of JoyAI that predicts the token after the next (MTP): attached to a model, trained, taken off again.

At position t the layer reads the decoder's last hidden state of token t, behind the final norm, and the embedding of
token t + 1, and predicts token t + 2 with the decoder's own head (DeepSeek-V3's technical report, arXiv 2412.19437,
section 2.2; hidden states as transformers' ``MtpModel`` takes them). JoyAI trains one such layer, whose MLP is dense,
with a weight of 0.1 on its loss (arXiv 2604.03044).

Letters: ``B`` batch, ``N`` tokens, ``C`` channels, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from pyra.backbones.joyai import JoyAIForCausalLM, mtp_layers
from pyra.backbones.joyai_folder import check_checkpoint
from pyra.backbones.joyai_mtp_weights import fill_layer
from pyra.errors import ConfigError

IGNORED = -100
"""Label of a token that no loss is taken of."""
LOSS_WEIGHT = 0.1
"""What the layer's loss counts beside that of the decoder, in the report."""
_BEFORE = "before"  # attribute of an attached layer: what the configuration said before


def attach_mtp(model: Any, source: str | Path | None = None, *, seed: int = 0) -> JoyAIForCausalLM:
    """Put an MTP layer beside a model, as its child ``mtp``.

    The layer shares the embedding and the head. ``state_dict`` and :func:`save_checkpoint` have it from then on, and
    the configuration says that there is one.

    Args:
        model: in place; one with an adapter around it is looked through.
        source: a checkpoint folder that holds the layer; None makes a new one: attention and norms of the decoder's
            last layer, the MLP of its last dense one, and a projection that adds embedding and hidden state.
        seed: of an MLP that is drawn, where no layer is dense.

    Returns:
        The JoyAI model itself.

    Raises:
        ConfigError: for another model, or one that has the layer already.
        CheckpointError: where ``source`` holds no such layer.
    """
    joyai = _joyai(model)
    if joyai.mtp is not None:
        raise ConfigError("the model has an MTP layer already: detach_mtp(model) comes first")
    layer = new_layer(joyai, seed) if source is None else read_layer(joyai, source)
    layer.train(joyai.training)
    setattr(layer, _BEFORE, joyai.config.num_nextn_predict_layers)
    joyai.mtp, joyai.config.num_nextn_predict_layers = layer, 1
    return joyai


def detach_mtp(model: Any) -> JoyAIForCausalLM:
    """Take the layer off again; the model is what it was before.

    Raises:
        ConfigError: for another model, or one without the layer.
    """
    joyai = _joyai(model)
    layer = attached_layer(joyai)
    joyai.config.num_nextn_predict_layers = getattr(layer, _BEFORE)
    joyai.mtp = None
    return joyai


def attached_layer(model: JoyAIForCausalLM) -> nn.Module:
    """Return the attached layer; raises :class:`ConfigError` where there is none."""
    if model.mtp is None:
        raise ConfigError("the model has no MTP layer: attach_mtp(model) makes one, attach_mtp(model, FOLDER) reads it")
    return model.mtp


def read_layer(model: JoyAIForCausalLM, folder: str | Path) -> nn.Module:
    """Read the layer of a checkpoint folder, for the device and type of ``model``; errors as :func:`attach_mtp`."""
    checkpoint = check_checkpoint(folder)
    layer = _empty_layer(model)
    fill_layer(layer, checkpoint, model)
    return layer


@torch.no_grad()
def new_layer(model: JoyAIForCausalLM, seed: int = 0) -> nn.Module:
    """Make a layer that begins near the decoder: see :func:`attach_mtp`."""
    layer: Any = _empty_layer(model)
    devices = [layer.eh_proj.weight.device] if layer.eh_proj.weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        layer.apply(model._init_weights)
    decoder: Any = model.get_decoder()
    last, block = decoder.layers[-1], layer.mtp_block
    dense = [each.mlp for each in decoder.layers if not hasattr(each.mlp, "experts")]
    _copy(decoder.norm, layer.post_norm)
    for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
        _copy(getattr(last, part), getattr(block, part))
    if dense:
        _copy(dense[-1], block.mlp)
    layer.eh_proj.weight.copy_(torch.eye(model.config.hidden_size).repeat(1, 2))
    return layer


def mtp_states(
    model: JoyAIForCausalLM,
    layer: Any,
    hidden_states: Tensor,
    next_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Run the layer, in its own type (while it trains, float32 beside a decoder in half precision).

    Args:
        model: whose embedding is used.
        layer: attached to it or not.
        hidden_states: [B, N, C] of tokens, behind the final norm, or of this very function.
        next_ids: [B, N] the token after each of them.
        attention_mask: [B, N] true where a hidden state is one of a token, not padding; None where all are.
        position_ids: [B, N] of the tokens of ``hidden_states``, where several sequences are packed into a row: a
            sequence's last hidden state belongs to it still, and no other position sees it. None counts.
        cache: with the keys and values of the positions before.

    Returns:
        [B, N, C], of which :func:`mtp_logits` makes logits.
    """
    hidden_states = hidden_states.to(layer.eh_proj.weight)
    embeds = model.get_input_embeddings()(next_ids).to(hidden_states)
    seen = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(seen, seen + next_ids.shape[1], device=hidden_states.device).unsqueeze(0)
    positions = positions if position_ids is None else position_ids
    mask = create_causal_mask(
        config=layer.config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    decoder: Any = model.get_decoder()
    found: Tensor = layer(
        embeds,
        hidden_states,
        position_embeddings=decoder.rotary_emb(embeds, positions + 1),  # those of next_ids
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
    )
    return found


def mtp_logits(model: JoyAIForCausalLM, states: Tensor) -> Tensor:
    """Return float32 logits [..., V] of states [..., C] of :func:`mtp_states`, by the decoder's own head."""
    head: Any = model.get_output_embeddings()
    found: Tensor = head(states.to(head.weight)).float()
    return found


def mtp_loss(
    model: Any,
    hidden_states: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the cross-entropy of the attached layer's predictions, in nats a token.

    The label of token p counts where it is not -100 and tokens p - 2, p - 1 and p are no padding and of one sequence;
    the first two tokens of a sequence have none to be predicted from. Gradients reach whatever requires them: the
    layer, and the decoder through hidden states, embedding and head.

    Args:
        model: with the layer attached.
        hidden_states: [B, N, C] of the decoder, behind its final norm (``last_hidden_state``).
        input_ids: [B, N].
        labels: [B, N] the tokens themselves, -100 where no loss is taken, as the decoder's own loss has them.
        attention_mask: [B, N] 0 on padding, at either side.
        position_ids: [B, N] where several sequences are packed into a row: they begin anew with each.
        num_items: what the sum over tokens is divided by, such as the labels of all batches that are accumulated; None
            divides by the labels that count here.

    Raises:
        ConfigError: for shapes that do not fit, or a model without the layer.
    """
    joyai = _joyai(model)
    layer = attached_layer(joyai)
    _check_shapes(hidden_states, input_ids, labels, attention_mask, position_ids)
    counts = labels[:, 2:] != IGNORED
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    pairs = present[:, :-2] & present[:, 1:-1]
    counts = counts & pairs & present[:, 2:]
    if position_ids is not None:
        counts = counts & (position_ids[:, 2:] == position_ids[:, :-2] + 2)
    if not input_ids.shape[1] > 2 or not bool(counts.any()):
        return hidden_states.sum() * 0 + sum(parameter.sum() for parameter in layer.parameters()) * 0
    states = mtp_states(
        joyai,
        layer,
        hidden_states[:, :-2],
        input_ids[:, 1:-1],
        attention_mask=None if attention_mask is None else pairs,
        position_ids=None if position_ids is None else position_ids[:, :-2],
    )
    logits = mtp_logits(joyai, states[counts.to(states.device)])
    targets = labels[:, 2:][counts].to(logits.device)
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total / (len(targets) if num_items is None else num_items)


def _check_shapes(hidden: Tensor, ids: Tensor, *others: Tensor | None) -> None:
    """Raise :class:`ConfigError` for shapes that do not fit each other."""
    if hidden.ndim != 3 or hidden.shape[:2] != ids.shape or any(o is not None and o.shape != ids.shape for o in others):
        found = ", ".join(str(list(each.shape)) for each in (hidden, ids, *others) if each is not None)
        raise ConfigError(
            f"mtp_loss takes hidden states [B, N, C] and ids, labels and masks [B, N], got shapes {found}"
        )


def _empty_layer(model: JoyAIForCausalLM) -> nn.Module:
    """Make the layer on the device and in the type of the decoder's last one."""
    configuration = copy.deepcopy(model.config)
    configuration.num_nextn_predict_layers = 1
    decoder: Any = model.get_decoder()
    device = next(parameter.device for parameter in decoder.layers[-1].parameters())
    (layer,) = mtp_layers(configuration)
    return layer.to(device=device, dtype=model.dtype)


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weights by name; a source with an adapter around its layers gives the layers' own."""
    own = {name.replace(".base_layer.", "."): value for name, value in source.state_dict().items()}
    target.load_state_dict({name: own[name] for name in target.state_dict()})


def _joyai(model: Any) -> JoyAIForCausalLM:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, JoyAIForCausalLM):
        raise ConfigError(f"MTP is for a JoyAIForCausalLM, got {type(model).__name__}: open it with load_model")
    return inner

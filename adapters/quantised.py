"""Frozen backbones of 8 or 4 bits, by bitsandbytes (arXiv 2208.07339, 2305.14314): the training needs less memory."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn

from pyra.backbones import locate, wrapped_config
from pyra.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def quantize_backbone(model: Model, bits: int = 8, compute_dtype: torch.dtype = torch.bfloat16) -> Model:
    """Hold the linear layers of an image encoder's blocks in 8 or 4 bits, in place; they cannot train any more.

    Everything else (embeddings, norms, head) keeps its precision. Models of transformers may be loaded so instead, with
    ``from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))``. Adapt the model afterwards. To
    deploy it, save the adapter and load it into the backbone in full precision: folding into few bits rounds again.

    Args:
        model: a supported backbone with its pretrained weights, not adapted and not merging yet.
        bits: 8 (LLM.int8) or 4 (NF4).
        compute_dtype: of the products, with 4 bits; with 8 bits they are float16 ones.

    Returns:
        ``model``.

    Raises:
        ConfigError: for other bits, without bitsandbytes, or for a model that is adapted, merging or quantised already.
        UnsupportedModelError: for what is no supported backbone.

    Example:
        >>> model = adapt(quantize_backbone(model, 4), pyra=PyraConfig(rate=0.5), peft=LoraConfig())  # doctest: +SKIP
    """
    if type(bits) is not int or bits not in (4, 8):
        raise ConfigError(f"bits must be 8 or 4, got {bits!r}")
    if not isinstance(compute_dtype, torch.dtype) or not compute_dtype.is_floating_point:
        raise ConfigError(f"compute_dtype must be a floating dtype such as torch.bfloat16, got {compute_dtype!r}")
    try:
        from bitsandbytes import nn as quantised
    except ImportError:
        raise ConfigError("quantised backbones need bitsandbytes: pip install 'pyra-adapt[quantised]'") from None
    if isinstance(model, PeftModel) or wrapped_config(model) is not None:
        raise ConfigError("quantise the backbone first, and give adapt() the outcome")
    family, core = locate(model)
    found = [
        (parent, name, child)
        for block in family.layers(core)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise ConfigError("this backbone has no linear layers left to quantise: it is quantised already")
    for parent, name, linear in found:
        sizes: Any = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 8:
            made: Any = quantised.Linear8bitLt(*sizes, has_fp16_weights=False)
            made.weight = quantised.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = quantised.Linear4bit(*sizes, compute_dtype=compute_dtype, quant_type="nf4")
            # On CPUs with AVX512-BF16, a forward in evaluation mode would repack the weights: they could neither train
            # nor be folded after it, and widths that are no multiple of 64 would fail.
            made.support_avx512bf16_for_cpu = False
            made.weight = quantised.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        setattr(parent, name, made.to(linear.weight.device).train(linear.training))
    marked: Any = model
    marked.is_loaded_in_8bit, marked.is_loaded_in_4bit = bits == 8, bits == 4  # what PEFT looks for
    return model

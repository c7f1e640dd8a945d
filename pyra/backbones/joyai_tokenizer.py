"""The tokenizer of JoyAI-LLM Flash, which is of DeepSeek-V3's family: does a text begin as the model expects?

transformers (seen in 5.23) drops ``add_bos_token`` of ``tokenizer_config.json`` wherever there is a ``tokenizer.json``,
and that of DeepSeek-V3 does not put the token in front of a text by itself. Its chat template writes the token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from pyra.backbones.joyai import JoyAIConfig
from pyra.errors import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: str | Path, **kwargs: Any) -> Any:
    """Open the tokenizer of a checkpoint, which begins a text as its files say.

    Through AutoTokenizer: ``LlamaTokenizerFast``, the class that DeepSeek-V3's files name, loses spaces and characters
    in transformers 5.

    Args:
        folder: of the checkpoint.
        kwargs: of ``AutoTokenizer.from_pretrained``.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **kwargs)
    if "add_bos_token" not in kwargs:
        heed_bos(tokenizer, str(folder))
    return tokenizer


def heed_bos(tokenizer: Any, source: str) -> None:
    """Have a tokenizer put BOS in front of texts, in place, where its files ask for it and transformers has dropped it.

    One that puts any token around a text has rules of its own in ``tokenizer.json`` and stays as it is.

    Args:
        tokenizer: of transformers.
        source: folder or hub name that it is from.
    """
    if tokenizer.bos_token_id is None or not hasattr(tokenizer, "add_bos_token"):
        return
    path = cached_file(source, TOKENIZER_CONFIG, _raise_exceptions_for_missing_entries=False)
    told = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if told.get("add_bos_token") is True and tokenizer("a")["input_ids"] == plain:
        tokenizer.add_bos_token = True


def check_tokenizer(tokenizer: Any, config: JoyAIConfig) -> None:
    """Hold a tokenizer against a configuration: the first token of a text is the one that the model was trained with.

    Raises:
        ConfigError: where the tokenizer has no or another token for the beginning of a text, does not put it there, or
            has more tokens than the model.
    """
    expected = config.bos_token_id
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: it is another model's"
        )
    if expected is None:
        return
    if tokenizer.bos_token_id != expected:
        raise ConfigError(
            f"the tokenizer's first token of a text (BOS) is {tokenizer.bos_token_id}, the model's {expected}: set "
            "tokenizer.bos_token, or take the checkpoint's own tokenizer"
        )
    if tokenizer("a")["input_ids"][:1] != [expected]:
        raise ConfigError(
            f"the tokenizer does not begin a text with BOS ({expected}), which the model expects: open it with "
            "add_bos_token=True (load_tokenizer does where the files say so)"
        )

"""Packed samples do not see each other, and their loss is that of the samples apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import TEMPLATE, as_rows, chat
from tiny_language import decoder, tokenizer
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pyra.backbones import joyai
from pyra.errors import ConfigError
from pyra.tasks.fitting.loop import training_values
from pyra.tasks.language.tokens import Answered, Encoder
from pyra.tasks.posttraining.chat import read_chats
from pyra.tasks.posttraining.encoding import encode_chats
from pyra.tasks.posttraining.sft import ISOLATES, chat_trainer, refuse_packing, training_data
from pyra.tasks.posttraining.sft_options import SftOptions
from pyra.tasks.posttraining.trainer import checkpointing

KINDS = ("llama", "qwen", "joyai")
ATTENTION = ("eager", "sdpa")


def words() -> Encoder:
    found = tokenizer()
    found.chat_template = TEMPLATE
    return Encoder(found, chat=True)


def rows(number: int = 9) -> list[Answered]:
    return encode_chats(read_chats(as_rows(map(chat, range(number))), None), words(), 200).rows


def model_of(kind: str, attention: str) -> Any:
    """Return a decoder in float64: what two ways of computing differ by is not rounding then.

    Eager attention and the router of a mixture take a step in float32 whatever they are given.
    """
    torch.manual_seed(0)
    sizes = {"num_nextn_predict_layers": 0, "initializer_range": 0.2, "vocab_size": 400}
    found: Any = joyai.JoyAIForCausalLM(joyai.tiny_config(**sizes)) if kind == "joyai" else decoder(kind)
    found.set_attn_implementation(attention)
    if kind == "joyai":
        found.set_experts_implementation("eager")  # the others compute in float32 at most
    return found.double().eval()


def packed_batch(length: int, count: int) -> tuple[dict[str, Any], Any]:
    data = training_data(rows(count), length)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return collate([data[index] for index in range(len(data))]), data


def losses_apart(model: nn.Module, kept: list[Answered]) -> torch.Tensor:
    """Negative log-likelihood of every answer token, one sample after the other."""
    found = []
    for row in kept:
        ids = torch.tensor([row.ids])
        scores = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        found += [-scores[place - 1, row.ids[place]] for place in range(row.start, len(row.ids))]
    return torch.stack(found)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_samples_apart(kind: str, attention: str) -> None:
    model, kept = model_of(kind, attention), rows(9)
    batch, data = packed_batch(120, 9)
    assert len(data) < len(kept), "several samples share a row"
    assert sum(map(len, data["seq_lengths"])) == len(kept), "none is cut"
    apart = losses_apart(model, kept).mean()
    apart.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scores = model(**batch, use_cache=False).logits[0, :-1].log_softmax(-1)  # the model's own loss is in float32
    labels = batch["labels"][0, 1:]
    together = -scores[labels != -100].gather(-1, labels[labels != -100, None]).mean()
    together.backward()
    exact = attention == "sdpa" and kind != "joyai"
    torch.testing.assert_close(together, apart, rtol=1e-12 if exact else 1e-6, atol=0)
    largest = max(float(one.abs().max()) for one in expected.values())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        if name in expected:
            difference = float((parameter.grad - expected[name]).abs().max())
            assert difference <= (1e-12 if exact else 1e-6) * largest, name


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_one_sample_changes_no_other(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    batch, _ = packed_batch(120, 5)
    ends = batch["cu_seq_lens_q"].tolist()
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits[0]
        for number, (start, end) in enumerate(pairwise(ends)):
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][0, start] = (changed["input_ids"][0, start] + 7) % 400
            moved = (model(**changed, use_cache=False).logits[0] - before).abs().amax(-1) > 1e-9
            inside = torch.zeros_like(moved)
            inside[start:end] = True
            assert not moved[~inside].any(), f"sample {number} is seen by another"
            assert moved[inside].all(), f"sample {number} does not see itself"


def test_the_trap_that_is_avoided() -> None:
    """With a cache the positions are not looked at: whoever drops ``use_cache=False`` learns of it here."""
    model = model_of("llama", "sdpa")
    batch, _ = packed_batch(120, 5)
    with torch.no_grad():
        apart, mixed = model(**batch, use_cache=False).logits, model(**batch, use_cache=True).logits
    assert not torch.allclose(apart, mixed, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_the_trainer_takes_that_loss(packed: bool, tmp_path: Path) -> None:
    model, kept = decoder(), rows(6)
    with torch.no_grad():
        expected = losses_apart(decoder().double(), kept).mean()
    data = training_data(kept, 120 if packed else None)
    options = SftOptions(backbone="x", data="y", batch_size=len(data), device="cpu")
    values = training_values(options, tmp_path, torch.device("cpu"), len(data)) | checkpointing(options)
    trainer = chat_trainer(model, words(), data, lambda: torch.optim.SGD(model.parameters()), values, packed=packed)
    (batch,) = list(trainer.get_train_dataloader())
    assert ("position_ids" in batch) == packed and batch["input_ids"].shape[0] == (1 if packed else len(kept))
    count = (batch["labels"] != -100).sum()
    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=count)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


def test_what_cannot_be_packed() -> None:
    model: Any = decoder()
    refuse_packing(model)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ConfigError, match=r"--packing: this model's attention \(paged\|sdpa\) does not keep samples"):
        refuse_packing(model)
    assert set(ATTENTION) <= set(ISOLATES)
    with pytest.raises(ConfigError, match="--packing: --method pyra merges the tokens of one prompt a row"):
        SftOptions(backbone="x", data="y", method="pyra", rate=0.5, packing=True)

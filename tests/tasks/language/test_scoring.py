"""Log-likelihoods and generated answers: a batch gives what one example alone gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_language import SENTENCES, decoder, encoder_model, tokenizer
from torch import Tensor, nn

from pyra.errors import TrainingError
from pyra.tasks.language.scoring import answer_nll, classify, generate, log_likelihoods, mean_nll
from pyra.tasks.language.tokens import Answered, Encoder, by_length, mask, pad
from pyra.tasks.language.training import batcher

PROMPTS = ["Review: fine", "Review: a dull film and a bore to watch", "a", "Question: Tom has 3 apples and buys 4 more"]
WORDS = ["positive", "negative", "5", "cold and dull"]


def rows_of(encoder: Encoder) -> list[Answered]:
    return [row for prompt in PROMPTS for row in encoder.answered(prompt, WORDS)]


def reference(model: nn.Module, row: Answered) -> float:
    """One sequence, no padding, no mask, float64, a plain sum."""
    double: Any = model.double()
    with torch.no_grad():
        logits = double(input_ids=torch.tensor([row.ids])).logits[0]
    total = 0.0
    for place in range(row.start, len(row.ids)):
        total += float(logits[place - 1][row.ids[place]] - logits[place - 1].logsumexp(-1))
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("pad_id", [0, 1, 77])
def test_log_likelihoods_are_those_of_float64_and_of_one_example_alone(kind: str, pad_id: int) -> None:
    rows = rows_of(Encoder(tokenizer()))
    together = log_likelihoods(decoder(kind), rows, pad_id=pad_id, batch_size=16)
    alone = [log_likelihoods(decoder(kind), [row], pad_id=pad_id, batch_size=1)[0] for row in rows]
    exact = [reference(decoder(kind), row) for row in rows]
    assert len({len(row.ids) for row in rows}) >= 5, "rows of many lengths"
    assert together == pytest.approx(alone, abs=2e-4) and together == pytest.approx(exact, abs=2e-4)
    assert max(exact) - min(exact) > 5, "a constant would not pass"


def test_answers_are_as_unlikely_as_a_plain_sum_says() -> None:
    rows = rows_of(Encoder(tokenizer()))
    found = answer_nll(decoder(), rows, pad_id=2, batch_size=3)
    exact = [-reference(decoder(), row) for row in rows]
    assert [one.nats for one in found] == pytest.approx(exact, abs=2e-4)
    assert [one.tokens for one in found] == [len(row.ids) - row.start for row in rows]
    assert len({one.tokens for one in found}) > 1, "a mean over answers would be another number"
    assert mean_nll(found) == pytest.approx(sum(exact) / sum(one.tokens for one in found))
    assert mean_nll([None, *found]) == mean_nll(found) and mean_nll([None]) is None


def test_padding_on_the_left_would_be_seen() -> None:
    """What the test above rules out: the same rows padded at the other side without positions."""
    rows = sorted(rows_of(Encoder(tokenizer())), key=lambda row: len(row.ids))
    model: Any = decoder()
    ids = [rows[0].ids, rows[-1].ids]
    with torch.no_grad():
        logits = model(input_ids=pad(ids, 1, left=True)).logits[0, -len(rows[0].ids) :].log_softmax(-1)
    wrong = sum(float(logits[i - 1][rows[0].ids[i]]) for i in range(rows[0].start, len(rows[0].ids)))
    assert abs(wrong - reference(decoder(), rows[0])) > 0.05


def test_models_that_give_all_logits_are_scored_the_same() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder()
            self.widths: list[int] = []

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Any:
            self.widths.append(input_ids.shape[0])
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    rows = rows_of(Encoder(tokenizer()))
    plain = Plain()
    found = log_likelihoods(plain, rows, pad_id=2, batch_size=8)
    assert found == pytest.approx(log_likelihoods(decoder(), rows, pad_id=2, batch_size=8), abs=1e-5)
    assert sum(plain.widths) < len(rows), "answers of one token share a forward"


def test_scoring_in_bfloat16_stays_near() -> None:
    rows = rows_of(Encoder(tokenizer()))
    exact = log_likelihoods(decoder(), rows, pad_id=2, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_likelihoods(decoder(), rows, pad_id=2, batch_size=4)
    assert found == pytest.approx(exact, rel=0.05, abs=0.5) and found != exact


def test_logits_that_are_no_numbers_are_told() -> None:
    broken = decoder()
    broken.get_parameter("lm_head.weight").data[5] = float("nan")
    with pytest.raises(TrainingError, match="NaN"):
        log_likelihoods(broken, rows_of(Encoder(tokenizer())), pad_id=0, batch_size=4)


def greedy(model: nn.Module, ids: Sequence[int], count: int, end: int) -> list[int]:
    """One prompt, no cache, one token after the other."""
    causal: Any = model
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count:
            token = int(causal(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1].argmax())
            if token == end:
                break
            made.append(token)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_greedy_whatever_the_batch(kind: str, batch_size: int) -> None:
    encoder = Encoder(tokenizer())
    model: Any = decoder(kind)
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True  # not what is asked
    prompts = [encoder.prompt(text) for text in PROMPTS]
    found = generate(model, prompts, encoder, max_new_tokens=12, batch_size=batch_size)
    expected = [encoder.decode(greedy(decoder(kind), ids, 12, 1)).lstrip() for ids in prompts]
    assert [one.text for one in found] == expected and len(set(found)) > 1
    assert [one.tokens for one in found] == [len(greedy(decoder(kind), ids, 12, 1)) for ids in prompts]
    assert model.generation_config.repetition_penalty == 5.0, "the model's own configuration is left as it was"


def test_generation_ends_at_a_stop_and_at_the_end_of_the_text() -> None:
    encoder, model = Encoder(tokenizer()), decoder()
    prompts = [encoder.prompt(text) for text in PROMPTS]
    free = [one.text for one in generate(model, prompts, encoder, max_new_tokens=30, batch_size=4)]
    marks = [text[len(text) // 2 :][:2] for text in free]
    said = generate(model, prompts, encoder, stop=marks, max_new_tokens=30, batch_size=4)
    stopped = [one.text for one in said]
    for whole, cut in zip(free, stopped, strict=True):
        assert whole.startswith(cut) and len(cut) < len(whole)
        assert not any(mark in cut for mark in marks)
    token = greedy(decoder(), prompts[0], 3, 1)[-1]
    ending: Any = decoder()
    ending.generation_config.eos_token_id = [token, 1]  # as chat models have several
    found = generate(ending, prompts, encoder, max_new_tokens=12, batch_size=4)
    assert found[0].text == encoder.decode(greedy(decoder(), prompts[0], 12, token)).lstrip()


def test_a_head_gives_the_same_labels_in_any_batch() -> None:
    words = tokenizer("words")
    encoder = Encoder(words)
    model: Any = encoder_model(vocab=len(words))
    rows = [encoder.texts([text], 64) for text in SENTENCES]
    with torch.no_grad():
        alone = [int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in rows]
    assert classify(model, rows, pad_id=encoder.pad_id, batch_size=5) == alone
    pair = encoder.texts(["a fine film", "a dull film"], 64)
    assert set(pair["token_type_ids"]) == {0, 1}
    assert len(encoder.texts(["a fine film " * 30], 10)["input_ids"]) == 10


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_an_answer_begins_where_the_prompt_ends(kind: str, end: bool) -> None:
    words = tokenizer(kind, end=end)
    encoder = Encoder(words)
    for prompt in PROMPTS:
        ids = encoder.prompt(prompt)
        assert ids[0] == words.convert_tokens_to_ids("<s>" if kind == "bpe" else "[CLS]")
        assert ids[-1] != words.sep_token_id, "nothing ends a prompt"
        for word, row in zip(WORDS, encoder.answered(prompt, WORDS), strict=True):
            assert row.ids[: row.start] == ids
            assert encoder.decode(row.ids[row.start :]).strip() == word
    assert encoder.end == ([words.eos_token_id] if end and kind == "bpe" else [])
    assert 0 <= encoder.pad_id < len(words)


def test_answers_that_join_with_the_prompt_begin_before_it() -> None:
    """A tokenizer that makes one token of the prompt's last letters and the answer."""

    class Joining:
        bos_token_id = eos_token_id = pad_token_id = unk_token_id = sep_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            ids, rest = [], text
            while rest:
                size = 3 if rest.startswith("t a") else 1
                ids.append(sum(map(ord, rest[:size])))
                rest = rest[size:]
            return {"input_ids": ids}

    encoder = Encoder(Joining())
    first, second = encoder.answered("at", ["a", "b"])
    assert first.start == second.start == 1, "the shared beginning, for both"
    assert len(first.ids) == 2 and len(second.ids) == 4
    (row,) = encoder.answered("t", ["a"])
    assert (row.ids[0], row.start) == (0, 1), "a prompt that is joined whole: something stands before it"
    assert encoder.prompt("") == [0]


def test_the_loss_is_of_the_answer_alone() -> None:
    encoder, model = Encoder(tokenizer()), decoder()
    rows = []
    for row in rows_of(encoder):
        rows.append({"input_ids": row.ids, "labels": [-100] * row.start + row.ids[row.start :]})
    batch = batcher(False, encoder.pad_id)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    trained: Any = model
    loss = trained(**batch).loss.item()
    tokens = sum(len(row.ids) - row.start for row in rows_of(encoder))
    exact = -sum(reference(decoder(), row) for row in rows_of(encoder)) / tokens
    assert loss == pytest.approx(exact, abs=1e-4)


def test_batches() -> None:
    assert list(by_length([1, 5, 3, 5], 3)) == [[1, 3, 2], [0]]
    assert pad([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    assert pad([[1, 2], [3]], 9, left=True).tolist() == [[1, 2], [9, 3]]
    assert mask([[1, 2], [3]], left=True).tolist() == [[1, 1], [0, 1]]

"""A tiny JoyAI that has learned something: trained from nothing on the texts of tasks, with a tokenizer of its own.

Random weights cannot tell a good expert from a bad one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pyra.backbones import joyai
from pyra.errors import ConfigError, TrainingError
from pyra.experts.balancing import BalancedExperts
from pyra.tasks.language.data import TextTask
from pyra.tasks.language.prompts import SEPARATOR

_MARKS = ("<s>", "</s>", "<pad>")
_WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is made and trained; the sizes are those that :func:`~pyra.backbones.joyai.config` takes.

    Attributes:
        hidden_size: width.
        layers: the first is dense.
        experts: of each other layer.
        active: experts of a token.
        steps: of AdamW.
        batch_size: texts a step.
        length: tokens of a text.
        lr: peak learning rate; one cosine over all steps.
        seed: of weights and order.
    """

    hidden_size: int = 128
    layers: int = 4
    experts: int = 16
    active: int = 4
    steps: int = 500
    batch_size: int = 16
    length: int = 256
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers; raises :class:`ConfigError` with all problems."""
        numbers = ("hidden_size", "layers", "experts", "active", "steps", "batch_size", "length", "lr")
        problems = [f"--{name.replace('_', '-')} must be above 0" for name in numbers if getattr(self, name) <= 0]
        if self.active > self.experts:
            problems.append(f"--active {self.active} is more than the {self.experts} experts of a layer")
        if self.layers < 2:
            problems.append("--layers must be 2 at least: the first is dense")
        if problems:
            raise ConfigError("; ".join(problems))


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer that begins each text with BOS (id 0), as the model expects.

    Raises:
        ConfigError: for fewer tokens than bytes and marks.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(_MARKS):
        raise ConfigError(f"--vocabulary must be {len(alphabet) + len(_MARKS)} at least (bytes and marks), got {size}")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_MARKS), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bos, eos, padding = _MARKS
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=bos, eos_token=eos, pad_token=padding)


def texts_of(tasks: Sequence[TextTask], split: str, limit: int | None = None) -> list[str]:
    """Return the prompts of a split with their answers, task after task, of each task ``limit`` at most."""
    return [example.prompt + SEPARATOR + example.answer for task in tasks for example in task.split(split, limit)]


def new_model(recipe: Recipe, vocabulary: int) -> joyai.JoyAIForCausalLM:
    """Make the model, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        width = recipe.hidden_size
        return joyai.JoyAIForCausalLM(
            joyai.tiny_config(
                hidden_size=width,
                num_hidden_layers=recipe.layers,
                intermediate_size=4 * width,
                moe_intermediate_size=width // 2,
                n_routed_experts=recipe.experts,
                num_experts_per_tok=recipe.active,
                q_lora_rank=width,
                kv_lora_rank=width // 2,
                qk_nope_head_dim=width // 4,
                qk_rope_head_dim=16,
                v_head_dim=width // 4,
                vocab_size=vocabulary,
                num_nextn_predict_layers=0,
            )
        )


def pretrain(
    model: joyai.JoyAIForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    recipe: Recipe,
    tell: Callable[[float], object] = lambda _: None,
) -> list[float]:
    """Train a model in place on texts that are strung together; return the loss of each step, nats a token.

    Args:
        model: of :func:`new_model`.
        tokenizer: of :func:`train_tokenizer`.
        texts: each ends with the end-of-text token.
        recipe: steps, sizes of a batch, learning rate.
        tell: called with the loss after each step.

    Raises:
        ConfigError: for texts that are shorter than one row.
        TrainingError: where the loss is no number.
    """
    rows = _rows(tokenizer, texts, recipe.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, recipe.steps))
    losses: list[float] = []
    model.train()
    with BalancedExperts(model) as balanced:
        for _, batch in zip(range(recipe.steps), _batches(rows, recipe), strict=False):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            if not loss.isfinite():
                raise TrainingError(f"the loss is {float(loss)} after {len(losses)} steps: lower --lr")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            balanced.step()
            losses.append(float(loss.detach()))
            tell(losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def held_out(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], train: Sequence[str], recipe: Recipe
) -> dict[str, float]:
    """Return nats a token on other texts: of the model, and of guessing by how frequent a token is in training."""
    rows = _rows(tokenizer, texts, recipe.length)
    total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(recipe.batch_size))
    seen = Counter(_rows(tokenizer, train, recipe.length).flatten().tolist())
    size = len(tokenizer) + sum(seen.values())
    guesses = [-math.log((seen[token] + 1) / size) for token in rows[:, 1:].flatten().tolist()]
    return {"model": total / len(rows), "unigram": sum(guesses) / len(guesses), "tokens": float(len(guesses))}


def _rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> Tensor:
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    if len(ids) < length:
        raise ConfigError(f"the texts have {len(ids)} tokens, --length asks for {length}: lower it")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _batches(rows: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch_size)


def _cosine(steps: int, step: int) -> float:
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

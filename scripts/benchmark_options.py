"""What each verb of ``pyra benchmark`` is told; that of decoders stands with its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyra.attention import ATTENTIONS
from pyra.kernels import BACKENDS
from pyra.records import option

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class ModelOptions:
    """Options of ``pyra benchmark model``."""

    backbone: str = option("vit_base_patch16_224", "timm name; other models than the paper's get its shape of schedule")
    image_size: int | None = option(None, "image side in pixels; the model's own by default")
    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    dtype: Dtype = option("float32", "of weights and images")  # noqa: RUF009 - a dataclass field
    backend: str = option("auto", "what runs matching and merging", choices=BACKENDS)
    attention: str = option("auto", "how sizes reach the attention", choices=ATTENTIONS)
    batch_size: int = option(16, "images a forward")
    train_batch_size: int = option(32, "images a training step")
    rounds: int = option(5, "timed forwards of each model; the median counts")
    train_rounds: int = option(3, "timed training steps of each model")
    threads: int | None = option(None, "CPU threads; all by default")
    training: bool = option(True, "measure training as well as inference")
    compile: bool = option(False, "measure compiled models and the time to compile them, too (needs a C++ compiler)")
    output: str = option("benchmark.json", "file to write the rows to")


@dataclass(kw_only=True)
class KernelOptions:
    """Options of ``pyra benchmark kernels``."""

    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    dtype: Dtype = option("bfloat16", "of tokens and keys")  # noqa: RUF009 - a dataclass field
    batch_sizes: list[int] | None = option(  # noqa: RUF009 - a dataclass field
        None, "comma list; 1,32,256, or 1,4 with --quick"
    )
    rounds: int = option(20, "timed turns of each implementation; 5 with --quick")
    compile: bool = option(True, "time plain PyTorch compiled, too (on a CPU this needs a C++ compiler)")
    threads: int | None = option(None, "CPU threads; all by default")
    quick: bool = option(False, "two small models and small batches: the checks, and one row of everything")
    output: str = option("benchmark-kernels.json", "file to write the rows to")


@dataclass(kw_only=True)
class AdapterOptions:
    """Options of ``pyra benchmark adapters``."""

    backbone: str = option("vit_base_patch16_224", "timm name")
    image_size: int | None = option(None, "image side in pixels; the model's own by default")
    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    dtype: Dtype = option("float32", "of weights and images")  # noqa: RUF009 - a dataclass field
    batch_size: int = option(16, "images a training step")
    rounds: int = option(5, "timed turns of each; the median counts")
    threads: int | None = option(None, "CPU threads; all by default")
    output: str = option("benchmark-adapters.json", "file to write the rows to")


@dataclass(kw_only=True)
class ExpertOptions:
    """Options of ``pyra benchmark experts``."""

    hidden: int = option(768, "channels of the model; a multiple of 8")
    intermediate: int = option(384, "channels of an expert; a multiple of 8")
    experts: int = option(128, "experts of the layer")
    active: int = option(8, "experts a token")
    tokens: int = option(256, "tokens a training step")
    rank: int = option(16, "rank of the factors of an expert")
    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    dtype: Dtype = option("float32", "of weights; factors are float32")  # noqa: RUF009 - a dataclass field
    rounds: int = option(7, "timed training steps of each; the median counts")
    threads: int | None = option(None, "CPU threads; all by default")
    output: str = option("benchmark-experts.json", "file to write the rows to")


@dataclass(kw_only=True)
class InputOptions:
    """Options of ``pyra benchmark input``."""

    backbones: list[str] = field(
        default_factory=lambda: ["demo", "vit_small_patch16_224"],
        metadata={"help": "timm names, or 'demo' (the small ViT that ships with pyra)"},
    )
    device: str = option("cpu", "cpu, cuda or cuda:NUMBER")
    dtype: Dtype = option("float32", "of weights and images")  # noqa: RUF009 - a dataclass field
    batch_size: int = option(32, "images a training step")
    rounds: int = option(15, "timed steps of each; the median counts")
    threads: int | None = option(None, "CPU threads; all by default")
    output: str = option("benchmark-input.json", "file to write the rows to")


@dataclass(kw_only=True)
class ExportsOptions:
    """Options of ``pyra benchmark exports``."""

    backbone: str = option("vit_base_patch16_224", "timm name")
    image_size: int | None = option(None, "image side in pixels; the model's own by default")
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "images a forward"})
    rounds: int = option(7, "timed forwards of each; the median counts")
    threads: int | None = option(None, "CPU threads; all by default")
    device: str = option("cpu", "cpu", choices=("cpu",))
    output: str = option("benchmark-exports.json", "file to write the rows to")


@dataclass(kw_only=True)
class ServeOptions:
    """Options of ``pyra benchmark serve``."""

    url: str = option("", "address that pyra serve has printed")
    image: str = option("", "image that every client sends")
    clients: int = option(64, "clients that send at once, each one request after the other")
    seconds: float = option(10.0, "that new requests are sent")
    output: str = option("benchmark-serve.json", "file to write the result to")

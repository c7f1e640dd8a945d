"""Keep libraries' chatter off the screen; warnings of our own stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence progress and advice of the libraries underneath, for command-line use only."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what transformers loads next makes it warn
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that a CPU build of a model uses no CUDA
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("timm", "torch.distributed", "torch.onnx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|timm|transformers|torch)\b")
    warnings.formatwarning = _in_one_line


def _in_one_line(message: Warning | str, *_: object, **__: object) -> str:
    """Return a warning as a command says it: its text, without the line of code that gave it."""
    text = " ".join(str(message).split()).removeprefix("pyra: ")
    return f"pyra: warning: {text}\n"

"""What an export wrote, and how far it is from the model it came from.

Merging sorts tokens by similarity. Where two similarities are equal to within rounding, another runtime may pick the
other pair, and the logits of that image then differ visibly, although both results are right: a trained model can
differ from its own float64 copy in this way. So a share of the images, :data:`TIES`, may differ where tokens merge;
they are counted and told apart from the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyra.errors import ExportError

TIES = 0.1
"""Share of the inputs that may merge differently in another runtime."""


@dataclass(frozen=True)
class Comparison:
    """The logits of an exported model, reloaded in one runtime, beside those of the model it came from.

    Attributes:
        runtime: what ran it.
        max_difference: largest absolute difference of a logit, over the inputs that agree.
        differing: inputs whose difference exceeds the tolerance; they merged differently.
        max_logit: largest absolute logit, for scale.
        top1_agreement: share of the real inputs with the same top-1 class.
        compared: number of inputs compared.
        real: how many of them, the first, are real ones; the others are random.
    """

    runtime: str
    max_difference: float
    differing: int
    max_logit: float
    top1_agreement: float
    compared: int
    real: int

    @property
    def relative_difference(self) -> float:
        """``max_difference`` as a share of the largest logit."""
        return self.max_difference / max(self.max_logit, 1e-12)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: of it.
        file: name of the file in its folder that holds the weights.
        megabytes: size of all its files, 1 MB = 1e6 bytes.
        seconds: taken to fold, write, reload and compare.
        comparisons: one a runtime that it was opened in.
        operators: how often an ONNX graph has each operator; empty for other formats.
    """

    format: str
    file: str
    megabytes: float
    seconds: float
    comparisons: tuple[Comparison, ...]
    operators: dict[str, int]

    @property
    def comparison(self) -> Comparison:
        """The comparison in the runtime that opens the export by default."""
        return self.comparisons[0]


def compare(
    runtime: str, expected: Tensor, actual: Tensor, *, tolerance: float, merges: bool, real: int | None = None
) -> Comparison:
    """Compare logits [B, classes] of the model and of the reloaded file.

    Args:
        runtime: name for the comparison.
        expected: the model's logits.
        actual: the file's.
        tolerance: largest difference that counts as agreement, as a share of the largest logit.
        merges: whether ties are to be expected.
        real: inputs, the first ones, that are real; None means all.

    Raises:
        ExportError: where more inputs differ than ties explain, or the shapes do.
    """
    if expected.shape != actual.shape:
        raise ExportError(
            f"the exported model in {runtime} returns {list(actual.shape)}, the model {list(expected.shape)}; nothing "
            "was written"
        )
    expected, actual = expected.double(), actual.double()
    real = len(expected) if real is None else real
    differences = (expected - actual).abs().amax(-1)
    largest = float(expected.abs().max())
    agreeing = differences <= tolerance * max(largest, 1e-12)  # False for NaN
    differing = int((~agreeing).sum())
    if differing > (int(TIES * len(expected)) if merges else 0):
        raise ExportError(
            f"the exported model in {runtime} differs on {differing} of {len(expected)} inputs, by up to "
            f"{float(differences.max()):.3g} (largest logit {largest:.3g}), more than the tolerance {tolerance:g} of "
            "it; nothing was written"
        )
    return Comparison(
        runtime=runtime,
        max_difference=float(differences[agreeing].max()) if agreeing.any() else 0.0,
        differing=differing,
        max_logit=largest,
        top1_agreement=float((expected[:real].argmax(-1) == actual[:real].argmax(-1)).double().mean()),
        compared=len(expected),
        real=real,
    )

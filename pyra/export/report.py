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
class ExportReport:
    """Comparison of an exported file, reloaded, with its model on the same inputs.

    Attributes:
        file: name of the file in its folder.
        megabytes: its size, 1 MB = 1e6 bytes.
        max_difference: largest absolute difference of a logit, over the images that agree.
        differing: inputs whose difference exceeds the tolerance; they merged differently.
        max_logit: largest absolute logit, for scale.
        top1_agreement: share of inputs with the same top-1 class.
        compared: number of inputs compared.
    """

    file: str
    megabytes: float
    max_difference: float
    differing: int
    max_logit: float
    top1_agreement: float
    compared: int

    @property
    def relative_difference(self) -> float:
        """``max_difference`` as a share of the largest logit."""
        return self.max_difference / max(self.max_logit, 1e-12)


def compare(
    file: str, megabytes: float, expected: Tensor, actual: Tensor, *, tolerance: float, merges: bool
) -> ExportReport:
    """Compare logits [B, classes] of the model and of the reloaded file.

    Args:
        file: name for the report.
        megabytes: its size.
        expected: the model's logits.
        actual: the file's.
        tolerance: largest difference that counts as agreement, as a share of the largest logit.
        merges: whether ties are to be expected.

    Raises:
        ExportError: where more inputs differ than ties explain.
    """
    expected, actual = expected.double(), actual.double()
    differences = (expected - actual).abs().amax(-1)
    largest = float(expected.abs().max())
    agreeing = differences <= tolerance * max(largest, 1e-12)  # False for NaN
    differing = int((~agreeing).sum())
    if differing > (int(TIES * len(expected)) if merges else 0):
        raise ExportError(
            f"the exported model differs on {differing} of {len(expected)} inputs, by up to "
            f"{float(differences.max()):.3g} (largest logit {largest:.3g}), more than the tolerance {tolerance:g} of "
            "it; nothing was written"
        )
    return ExportReport(
        file=file,
        megabytes=megabytes,
        max_difference=float(differences[agreeing].max()) if agreeing.any() else 0.0,
        differing=differing,
        max_logit=largest,
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        compared=len(expected),
    )

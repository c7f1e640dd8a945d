"""What an export wrote, and how far it is from the model it came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExportReport:
    """Comparison of an exported file, reloaded, with its model on the same inputs.

    Attributes:
        file: name of the file in its folder.
        megabytes: its size, 1 MB = 1e6 bytes.
        max_difference: largest absolute difference of a logit.
        max_logit: largest absolute logit, for scale.
        top1_agreement: share of inputs with the same top-1 class.
        compared: number of inputs compared.
    """

    file: str
    megabytes: float
    max_difference: float
    max_logit: float
    top1_agreement: float
    compared: int

    @property
    def relative_difference(self) -> float:
        """``max_difference`` as a share of the largest logit."""
        return self.max_difference / max(self.max_logit, 1e-12)


def compare(file: str, megabytes: float, expected: Tensor, actual: Tensor) -> ExportReport:
    """Compare logits [B, classes] of the model and of the reloaded file."""
    expected, actual = expected.double(), actual.double()
    return ExportReport(
        file=file,
        megabytes=megabytes,
        max_difference=float((expected - actual).abs().max()),
        max_logit=float(expected.abs().max()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        compared=len(expected),
    )

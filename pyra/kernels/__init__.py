"""Matching and merging as operators: tensors in, tensors out; beside each Triton kernel a plain PyTorch reference."""

from pyra.kernels.choice import BACKENDS, backend

__all__ = ["BACKENDS", "backend"]

"""Measured speed: of the kernels against plain PyTorch, of whole models against the unwrapped one."""

"""A model given back as it was where something fails half-way: modules, flags, hooks and weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def unchanged_on_error(model: nn.Module, altered: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Undo in ``model`` whatever the block did to it, where the block raises.

    Every attribute of every module comes back, children, hooks and what PEFT or merging put there included, and every
    parameter and buffer its flag and its storage. Values that are overwritten within their storage are not seen.

    Args:
        model: what is to be unchanged.
        altered: modules whose values the block may overwrite in place: these are copied first.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    tensors = [(tensor, tensor.requires_grad, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    values = {id(tensor): (tensor, tensor.detach().clone()) for module in altered for tensor in _tensors(module)}
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            _put_back(module, attributes)
        for tensor, flag, data in tensors:
            tensor.data = data
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
        for tensor, value in values.values():
            tensor.data.copy_(value)
        raise


def _tensors(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())


def _attributes(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Name, value, and what the value holds where it is a dictionary, a set or a list."""
    return [
        (name, value, (value.copy() if value else ()) if isinstance(value, (dict, set, list)) else None)
        for name, value in module.__dict__.items()
    ]


def _put_back(module: nn.Module, attributes: list[tuple[str, Any, Any]]) -> None:
    module.__dict__.clear()
    for name, value, content in attributes:
        if content is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        module.__dict__[name] = value

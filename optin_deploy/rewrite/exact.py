"""Run a model in float64 while only the part in hand is held in it: one block, or one module outside of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optin_deploy.layout import ModelLayout

Changes = Callable[[int], Mapping[str, Tensor]]
"""Index of a block -> entries of its state dict, by whole path, that stand in for its own."""


@contextmanager
def in_float64(model: nn.Module, layout: ModelLayout, changes: Changes | None = None) -> Iterator[None]:
    """Let forwards of this model compute in float64; its weights are untouched afterwards, also after an error.

    Tables of embeddings, the largest tensors outside of the blocks, stay as they are: what is looked up is converted.
    """
    parts = _Parts()
    blocks = {layer.path: index for index, layer in enumerate(layout.layers)}
    with ExitStack() as stack:
        stack.callback(parts.leave_all)
        for path, module in model.named_modules():
            inside = any(path == block or path.startswith(f"{block}.") for block in blocks)
            if isinstance(module, nn.Embedding) and not inside:
                stack.callback(module.register_forward_hook(_widened_output).remove)
                continue
            if path in blocks:
                tensors = {**dict(module.named_parameters(path)), **dict(module.named_buffers(path))}
                enter = parts.entering(tensors, changes, blocks[path])
            elif not inside and (own := _own(module)):
                enter = parts.entering(own, None, 0)
            else:
                continue
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(parts.leave).remove)
        yield


class _Parts:
    """What is in float64 now, with what it was before; the innermost part last."""

    def __init__(self) -> None:
        self.before: list[list[tuple[Tensor, Tensor]]] = []

    def entering(self, tensors: Mapping[str, Tensor], changes: Changes | None, index: int) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            new = changes(index) if changes else {}
            some = {name: t for name, t in tensors.items() if t.is_floating_point()}
            self.before.append([(t, t.data) for t in some.values()])
            for name, tensor in some.items():
                tensor.data = new.get(name, tensor.data).detach().double()
            return tree_map(_wide, args), tree_map(_wide, kwargs)

        return enter

    def leave(self, *ignored: object) -> None:
        for tensor, data in self.before.pop():
            tensor.data = data

    def leave_all(self) -> None:
        while self.before:
            self.leave()


def _own(module: nn.Module) -> dict[str, Tensor]:
    own: Iterable[tuple[str, Tensor]] = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return dict(own)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(torch.float64)

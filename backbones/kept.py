"""What a prediction keeps for its backward pass, counted without keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten

from ..region.conditioning import text_blocks, with_blocks
from .protocol import Backbone


def is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own; quantised weights and the like have not."""
    return type(tensor) in (Tensor, nn.Parameter)


def no_weight_of(module: nn.Module) -> Callable[[Tensor], bool]:
    """Whether a tensor is an activation, with memory other than the module's weights."""
    every = (*module.parameters(), *module.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in every if is_plain(tensor)}
    return lambda tensor: is_plain(tensor) and tensor.untyped_storage().data_ptr() not in weights


@dataclass
class Kept:
    """Bytes that one prediction keeps for its backward pass."""

    everything: int = 0
    in_blocks: int = 0  # of them
    between: int = 0  # the inputs of all blocks
    largest: int = 0  # in one block

    @property
    def checkpointed(self) -> int:
        """What is kept where blocks are computed again, and while the largest of them is."""
        return self.everything - self.in_blocks + self.between + self.largest


@contextmanager
def counted(module: nn.Module, found: Kept) -> Iterator[None]:
    """Count what a forward pass keeps for the backward pass, and keep none of it, so that it takes no more memory."""
    is_own = no_weight_of(module)

    def count(tensor: Tensor) -> None:
        found.everything += tensor.nbytes if is_own(tensor) else 0

    def watched(block: nn.Module) -> Any:
        forward = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            before = found.everything
            outputs = forward(*args, **kwargs)
            inside = found.everything - before
            found.in_blocks += inside
            found.largest = max(found.largest, inside)
            leaves = tree_flatten((args, kwargs))[0]
            found.between += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            return outputs

        return call

    with blocks_as(module, watched), saved_tensors_hooks(count, lambda nothing: nothing):
        yield


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts of a network that are called as a whole."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _blocks(child)
        else:
            yield child


@contextmanager
def blocks_as(module: nn.Module, changed: Callable[[nn.Module], Any]) -> Iterator[None]:
    """The blocks of a network called by other functions, which `changed` makes of each."""
    blocks = list(_blocks(module))
    own = {id(block): block.__dict__["forward"] for block in blocks if "forward" in block.__dict__}  # other packs'
    try:
        for block in blocks:
            block.forward = changed(block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
            if id(block) in own:
                block.forward = own[id(block)]


def kept_by(backbone: Backbone, network: nn.Module) -> Kept:
    """What one prediction of a backbone, which asks this network, keeps."""
    found, (entry,), sigma = Kept(), backbone.encode([""]), backbone.sigmas(2)[:1]
    text = {name: tensor.clone().requires_grad_(True) for name, tensor in text_blocks(entry).items()}
    with torch.enable_grad(), counted(network, found):
        backbone.denoise(backbone.start(1, sigma[0], Generator().manual_seed(0)), sigma, [with_blocks(entry, text)])
    return found

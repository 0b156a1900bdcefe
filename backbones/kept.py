"""What a prediction with gradients takes of memory, measured on small ones without keeping it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..region.conditioning import Entry, text_blocks, with_blocks
from .protocol import Backbone


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def has_memory(tensor: Tensor) -> bool:
    """Whether it has memory of its own; a quantised weight has not, but holds tensors that have."""
    return is_plain(tensor) or not hasattr(tensor, "__tensor_flatten__")


def _places(tensor: Tensor) -> Iterator[int]:
    """What tells the memory of a tensor, or of the tensors that it holds, from other memory."""
    if has_memory(tensor):
        yield tensor.untyped_storage()._cdata
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _places(getattr(tensor, name))


def no_weight_of(module: nn.Module) -> Callable[[Tensor], bool]:
    """Whether a tensor is an activation, or a copy of a weight: with memory other than the module's weights."""
    weights = {place for tensor in (*module.parameters(), *module.buffers()) for place in _places(tensor)}
    return lambda tensor: weights.isdisjoint(_places(tensor))


def content(tensor: Tensor) -> Hashable:
    """What tells whether two views of one living storage hold the same numbers in the same order.

    Of activations: writes into them are counted, as those into buffers of weights are not.
    """
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class Kept:
    """Bytes that one prediction, or a batch of them, keeps for its backward pass, and what it takes beside that."""

    everything: int = 0
    in_blocks: int = 0  # of them
    between: int = 0  # the inputs of all blocks
    largest: int = 0  # the most that one block takes, with what it keeps
    copies: int = 0  # of everything: weights that were cast, moved or put together as they were needed
    moving: int = 0  # the most that lives at once while nothing is kept
    peak: int = 0  # and while everything is

    @property
    def checkpointed(self) -> int:
        """What is kept where blocks are computed again, and while the largest of them is."""
        return self.everything - self.in_blocks + self.between + self.largest

    @property
    def twice(self) -> Kept:
        return Kept(*(2 * number for number in astuple(self)))


@dataclass(frozen=True)
class Needs:
    """Bytes by the number of predictions in a step: those of `one`, and for each further one what `two` has more."""

    one: Kept
    two: Kept

    def of(self, count: int) -> Kept:
        pairs = zip(astuple(self.one), astuple(self.two))
        return Kept(*(one + (count - 1) * max(two - one, 0) for one, two in pairs))

    def step(self, count: int, saving: bool) -> int:
        """What a step takes beside the weights; `saving`: when it keeps few activations."""
        kept = self.of(count)
        return max(kept.checkpointed, kept.moving) if saving else kept.peak

    def fits(self, count: int, room: float) -> int:
        """How many of `count` can be in a step that keeps few activations and takes no more than `room`: 1 at least."""
        first, each = self.step(1, True), self.step(2, True) - self.step(1, True)
        return count if each <= 0 else max(min(count, 1 + int((room - first) / each)), 1)


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, of those that are made under it: `most` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.kept = self.peak = 0  # what the backward pass needs, and the most with it
        self._met: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _meet(self, tensors: Any, are_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or not has_memory(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._met:
                continue
            self._met[storage] = True
            if are_new:
                self.now += storage.nbytes()
                self.most, self.peak = max(self.most, self.now), max(self.peak, self.now + self.kept)
                finalize(storage, self._lose, storage.nbytes())

    def _lose(self, count: int) -> None:
        self.now -= count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), False)
        outputs = func(*args, **(kwargs or {}))
        self._meet(outputs, True)
        return outputs


def _first_met() -> Callable[[Tensor], bool]:
    """Whether a tensor's content is met for the first time."""
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the storage it is in

    def is_new(tensor: Tensor) -> bool:
        contents = known.setdefault(tensor.untyped_storage(), set())
        before = len(contents)
        contents.add(content(tensor))
        return len(contents) > before

    return is_new


def _floating(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values)
            if isinstance(leaf, Tensor) and has_memory(leaf) and leaf.is_floating_point()]  # fmt: skip


@contextmanager
def counted(module: nn.Module, found: list[Kept]) -> Iterator[None]:
    """Count what a forward pass keeps for the backward pass, and keep none of it, so that it takes no more memory.

    On leaving, the count is added to the list.
    """
    is_own, living = no_weight_of(module), Living()
    like_weights = {tuple(sorted(tensor.shape)) for tensor in module.parameters() if len(tensor.shape) > 1}
    in_blocks = between = largest = copies = 0
    is_new, is_new_between = _first_met(), _first_met()

    def count(tensor: Tensor) -> None:
        nonlocal copies
        if not is_own(tensor) or (tensor.requires_grad and not is_new(tensor)):
            return
        living.kept += tensor.nbytes
        if not tensor.requires_grad and tuple(sorted(tensor.shape)) in like_weights:
            copies += tensor.nbytes

    def watched(block: nn.Module) -> Any:
        forward = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal in_blocks, between, largest
            inputs = _floating((args, kwargs))
            between += sum(tensor.nbytes for tensor in inputs if is_new_between(tensor))
            kept, start, peak = living.kept, living.now + living.kept, living.peak
            living.peak = start
            outputs = forward(*args, **kwargs)
            in_blocks += living.kept - kept
            ends = sum(tensor.nbytes for tensor in (*inputs, *_floating(outputs)))  # copies, and their gradients
            largest = max(largest, living.peak - start + ends)
            living.peak = max(living.peak, peak)
            return outputs

        return call

    with blocks_as(module, watched), saved_tensors_hooks(count, lambda nothing: nothing), living:
        yield
    found.append(Kept(living.kept, in_blocks, between, largest, copies, living.most, living.peak))


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


def step_inputs(backbone: Backbone, entry: Entry, count: int) -> tuple[Tensor, Tensor, list[Entry]]:
    """What `denoise` is asked in a step of so many predictions: latents, noise levels, and entries with gradients."""
    sigma = backbone.sigmas(2)[:1]
    text = {name: tensor.clone().requires_grad_(True) for name, tensor in text_blocks(entry).items()}
    x = backbone.start(count, sigma[0], Generator().manual_seed(0))
    return x, sigma.expand(count), [with_blocks(entry, text)] * count


def needs_of(backbone: Backbone, network: nn.Module) -> Needs:
    """What predictions of a backbone, which asks this network, take."""
    found: list[Kept] = []
    (entry,) = backbone.encode([""])
    for count in (1, 2):
        with torch.enable_grad(), counted(network, found):
            backbone.denoise(*step_inputs(backbone, entry, count))
    return Needs(*found)

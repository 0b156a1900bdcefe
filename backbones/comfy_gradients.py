"""Gradients through networks that were built to be run, not trained: ComfyUI's weights, kernels and in-place writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import patch
from weakref import ref

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from .kept import blocks_as, content, has_memory, is_plain, no_weight_of

# ComfyUI's functions of attention that have derivatives; the other ones (Sage, Flash, int8) are for inference.
_DIFFERENTIABLE = {f"attention_{name}" for name in ("basic", "pytorch", "split", "sub_quad", "xformers")}
KITCHEN = "comfy_kitchen"  # the library of ComfyUI's fused kernels, since 0.4


def _again_eagerly(eager: Callable[..., Any], ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients for the inputs of a fused kernel, by way of its form in plain operations."""
    with torch.enable_grad():
        tensors = iter([tensor.detach().requires_grad_(ctx.needs_input_grad[place])
                        for place, tensor in zip(ctx.places, ctx.saved_tensors)])  # fmt: skip
        inputs = [next(tensors) if place in ctx.places else value for place, value in enumerate(ctx.others)]
        outputs = eager(**dict(zip(ctx.names, inputs)))
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    found = [(output, gradient) for output, gradient in zip(outputs, gradients)
             if gradient is not None and output.requires_grad]  # fmt: skip
    wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
    slopes = torch.autograd.grad([output for output, _ in found], [inputs[place] for place in wanted],
                                 [gradient for _, gradient in found], allow_unused=True)  # fmt: skip
    by_place = dict(zip(wanted, slopes))
    return tuple(by_place.get(place) for place in range(len(inputs)))


def _keep_inputs(names: list[str], ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.names, ctx.places = names, [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def differentiable_kernels() -> list[str]:
    """Give every kernel of comfy-kitchen that has no derivative the one of its eager form. Returns their names.

    Kernels without an eager form, and those that write into their inputs, stay without: the latter refuse gradients
    themselves, and ComfyUI takes them for inference only.
    """
    try:
        from comfy_kitchen.backends import eager
        from torch._library.custom_ops import OPDEFS
    except ImportError:  # an older ComfyUI or torch, without such kernels
        return []
    done = []
    for full_name, kernel in list(OPDEFS.items()):
        library, _, name = full_name.partition("::")
        form = getattr(eager, name, None)
        if library != KITCHEN or form is None or getattr(kernel, "_backward_fn", "unknown") is not None:
            continue
        schema = kernel._opoverload._schema
        names = [argument.name for argument in schema.arguments]
        if not schema.is_mutable and set(names) <= set(signature(form).parameters):
            kernel.register_autograd(partial(_again_eagerly, form), setup_context=partial(_keep_inputs, names))
            done.append(name)
    return done


differentiable_kernels()


def differentiable_attention(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What a network is to call instead of its attention (`optimized_attention_override`) while it learns."""
    chosen = function if function.__name__ in _DIFFERENTIABLE else attention.attention_pytorch
    return chosen(*args, **kwargs)


def _plain(parameter: Tensor) -> Tensor:
    """A tensor over the same memory that autograd may use, and that never collects a gradient.

    Weights made in inference mode (as all of ComfyUI's are) cannot be saved for a backward pass.
    """
    if has_memory(parameter):
        with torch._C.DisableTorchFunctionSubclass():  # a subclass may tell another size than its memory's
            seen = (parameter.storage_offset(), Tensor.size(parameter), Tensor.stride(parameter))
            alias = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            alias.set_(parameter.untyped_storage(), *seen)
        if not is_plain(parameter):
            alias = alias.as_subclass(type(parameter))
    else:
        alias = parameter.detach()
    if type(parameter) is nn.Parameter:
        alias = nn.Parameter(alias, requires_grad=False)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _usable(tensor: Tensor | None) -> Tensor | None:
    return _plain(tensor) if tensor is not None and tensor.is_inference() else tensor


@contextmanager
def _in_training() -> Iterator[None]:
    """ComfyUI's own switch, which keeps its networks from kernels that only infer, where there is one; and weights that
    it casts as they are needed (from other memory, of other types, or kept from an earlier sampling) made usable.
    """
    has_switch, cast = hasattr(comfy.model_management, "in_training"), comfy.ops.cast_bias_weight

    def usable(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        weight, bias, *rest = cast(*args, **kwargs)
        return _usable(weight), _usable(bias), *rest

    with ExitStack() as stack:
        stack.enter_context(patch.object(comfy.ops, "cast_bias_weight", usable))
        if has_switch:
            stack.enter_context(patch.object(comfy.model_management, "in_training", True))
        yield


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module to its inputs. On leaving, every weight is the very object it was."""
    if not torch.is_grad_enabled():
        yield
        return
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    aliases: dict[int, Tensor] = {}  # shared weights stay shared
    try:
        for child in module.modules():
            for store in (child._parameters, child._buffers):
                for name, tensor in store.items():
                    if tensor is not None and (tensor.is_inference() or tensor.requires_grad):
                        replaced.append((store, name, tensor))
        for store, name, tensor in replaced:
            if id(tensor) not in aliases:
                aliases[id(tensor)] = _plain(tensor)
            store[name] = aliases[id(tensor)]
        with _in_training():
            yield
    finally:
        for store, name, tensor in replaced:
            if store.get(name) is aliases.get(id(tensor)):  # else ComfyUI has moved it meanwhile
                store[name] = tensor


@contextmanager
def unharmed(module: nn.Module) -> Iterator[None]:
    """Keep copies of what the backward pass needs: ComfyUI's networks write into tensors that others still need."""
    if not torch.is_grad_enabled():
        yield
        return
    is_own = no_weight_of(module)
    copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the storage that was copied: contents and their copies

    def kept(tensor: Tensor) -> Tensor:
        if not is_own(tensor):
            return tensor.detach()
        if not tensor.requires_grad:  # weights that were moved may be overwritten without a trace
            return tensor.detach().clone()
        known = copies.setdefault(tensor.untyped_storage(), {})
        copy = known.get(content(tensor), lambda: None)()
        if copy is None:
            copy = tensor.detach().clone()
            known[content(tensor)] = ref(copy)
        return copy

    with saved_tensors_hooks(kept, lambda tensor: tensor):
        yield


class _Again(torch.autograd.Function):
    """Part of a network that is run again for the backward pass, from copies of its inputs, as it may write into them.

    torch.utils.checkpoint knows nothing of either.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[Any]], *inputs: Tensor) -> tuple[Any, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return tuple(run(*(tensor.clone() for tensor in inputs)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_(needed)
                  for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])]  # fmt: skip
        with torch.enable_grad():
            outputs = ctx.run(*(tensor.clone() for tensor in inputs))
        moved = [i for i, output in enumerate(outputs) if isinstance(output, Tensor) and output.requires_grad]
        torch.autograd.backward([outputs[i] for i in moved], [gradients[i] for i in moved])
        return None, *(tensor.grad for tensor in inputs)


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Keep no activations within blocks for the backward pass, which computes them again (Chen et al., 2016)."""

    def again(block: nn.Module) -> Any:
        forward = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, shape = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            inputs, found = [leaves[place] for place in places], [shape]
            leaves = [None if i in places else leaf for i, leaf in enumerate(leaves)]

            def run(*inputs: Tensor) -> list[Any]:
                given = [*leaves]
                for place, tensor in zip(places, inputs):
                    given[place] = tensor
                args, kwargs = tree_unflatten(given, shape)
                with differentiable(block), unharmed(block):  # the second time is after `denoise` has put weights back
                    outputs, found[0] = tree_flatten(forward(*args, **kwargs))
                return outputs

            return tree_unflatten(_Again.apply(run, *inputs), found[0])

        return call

    with blocks_as(module, again):
        yield



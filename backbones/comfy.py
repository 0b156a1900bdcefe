"""Any MODEL, CLIP and VAE of ComfyUI as a backbone.

Everything runs through ComfyUI's own machinery: its text encoding, its conditioning batches, its model patches and
wrappers, its memory management. Nothing here knows an architecture.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..region.conditioning import CROSS_ATTENTION, Entry, text_blocks, text_tensors, with_blocks
from .kept import Kept, blocks_as, counted, is_plain, no_weight_of

SCHEDULER = "normal"
DEFAULT_SIZE = 512  # pixels; a latent format may name its own as `training_size`
# Pixels to a latent's one, by its format, for versions of ComfyUI whose formats do not say; 8 elsewhere.
DOWNSCALES = {"SC_Prior": 42, "SC_B": 4, "LTXV": 32, "LTXAV": 32, "HunyuanImage21": 32, "Wan22": 16, "Flux2": 16,
              "HunyuanVideo15": 16, "ChromaRadiance": 1}  # fmt: skip
EXAMPLE = "a photo of a woman with a red umbrella on a street in the rain, at night"  # of usual length, to measure with

# torch's errors about tensors that do not fit together; those about memory speak of sizes too
_MISFIT = re.compile(r"^(?!.*(memory|buffer)).*(shape|size|dimension)", re.IGNORECASE | re.DOTALL)


def _plain(parameter: Tensor) -> Tensor:
    """A tensor over the same memory that autograd may use, and that never collects a gradient.

    Weights made in inference mode (as all of ComfyUI's are) cannot be saved for a backward pass.
    """
    if is_plain(parameter):
        storage = parameter.untyped_storage()
        alias = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        alias.set_(storage, parameter.storage_offset(), parameter.size(), parameter.stride())
    else:
        alias = parameter.detach()
    if isinstance(parameter, nn.Parameter):
        alias = nn.Parameter(alias, requires_grad=False)
    alias.__dict__.update(parameter.__dict__)
    return alias


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
        yield
    finally:
        for store, name, tensor in replaced:
            store[name] = tensor


def _rotate_back(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    operator = getattr(torch.ops.comfy_kitchen, context.operator)
    turned = operator(*gradients, context.turn.transpose(-1, -2))
    return (*(turned if isinstance(turned, (tuple, list)) else (turned,)), None)


def _differentiable_rotations() -> None:
    """Derivatives for comfy-kitchen's rotary embeddings, which have none: a rotation's is the rotation back."""
    for name in ("apply_rope", "apply_rope1"):

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
            ctx.operator, ctx.turn = name, inputs[-1]

        try:
            torch.library.register_autograd(f"comfy_kitchen::{name}", _rotate_back, setup_context=keep)
        except (AttributeError, RuntimeError):  # no comfy-kitchen, or one that has derivatives
            pass


_differentiable_rotations()


@contextmanager
def unharmed(module: nn.Module) -> Iterator[None]:
    """Keep copies of what the backward pass needs: ComfyUI's networks write into tensors that others still need."""
    if not torch.is_grad_enabled():
        yield
        return
    is_own = no_weight_of(module)

    def kept(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if is_own(tensor) else tensor.detach()

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


def _ordinary(value: Any) -> Any:
    """The value with its tensors copied out of inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_ordinary(item) for item in value)
    return value


def _pieces(indices: Sequence[int], most: int) -> list[Sequence[int]]:
    return [indices[begin : begin + most] for begin in range(0, len(indices), most)]


def _sizes(conditions: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(condition.size()) for name, condition in conditions.items()}


def grouped(encoded: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices of encoded entries that can run in one batch: equal in all shapes and in all that has no batch."""
    groups: list[list[int]] = []
    for index, entry in enumerate(encoded):
        conditions = entry["model_conds"]
        for group in groups:
            first = encoded[group[0]]["model_conds"]
            # ComfyUI would pad prompts of different lengths by repeating them; apart, they run as they are
            if comfy.samplers.cond_equal_size(first, conditions) and _sizes(first) == _sizes(conditions):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def merged(encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Encoded entries of one group as a single entry with a batch."""
    first = encoded[0]
    if len(encoded) == 1:
        return first
    tensors = comfy.samplers.cond_cat([entry["model_conds"] for entry in encoded])
    conditions = {name: first["model_conds"][name]._copy_with(value) for name, value in tensors.items()}
    return {**first, "model_conds": conditions}


class ComfyBackbone:
    """ComfyUI's MODEL (a ModelPatcher), CLIP and VAE; `model` and `vae` may be None."""

    def __init__(self, model: Any, clip: Any, vae: Any = None, size: int = 0) -> None:
        """`size` is the width and height in pixels to learn at; 0 is the model's own."""
        self.model, self.clip, self.vae, self.size = model, clip, vae, size
        self.can_denoise = model is not None
        self.can_decode = model is not None and vae is not None
        self._signature: dict[str, Any] | None = None
        if model is not None and self._format.latent_dimensions not in (2, 3):
            raise ValueError("This model draws no pictures: a safe region needs an image or video model to learn on.")

    @property
    def _format(self) -> Any:
        return self.model.get_model_object("latent_format")

    @property
    def _sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    # --- text ---

    def signature(self) -> dict[str, Any]:
        if self._signature is None:
            encoder = self.clip.cond_stage_model
            parts = [name for name, child in encoder.named_children() if hasattr(child, "encode_token_weights")]
            blocks = {name: tensor.shape[-1] for name, tensor in text_tensors(self.encode([""])[0]).items()}
            # ComfyUI derives a class from the family's own within a function, and gives some the name of another
            family = next(kind for kind in type(encoder).__mro__ if "<locals>" not in kind.__qualname__)
            self._signature = {"name": family.__name__, "parts": parts, "blocks": blocks}
        return self._signature

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        entries = []
        for prompt in prompts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                # several entries come only from hooks that are scheduled over sampling; the first one stands for all
                tensor, options = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))[0]
            # hooks would patch weights within a step, under the gradients
            options = {name: value for name, value in options.items() if name != "hooks"}
            with torch.inference_mode(False):
                entries.append([_ordinary(tensor), {name: _ordinary(value) for name, value in options.items()}])
        return entries

    # --- noise ---

    def sigmas(self, steps: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            sigmas = comfy.samplers.calculate_sigmas(self._sampling, SCHEDULER, steps)
            return sigmas.to(self.model.load_device, torch.float32, copy=True)

    def _latent_shape(self) -> tuple[int, ...]:
        latent = self._format
        size = self.size or getattr(latent, "training_size", DEFAULT_SIZE)
        ratio = getattr(latent, "spacial_downscale_ratio", None)
        if ratio is None and self.vae is not None:
            ratio = self.vae.spacial_compression_decode()
        ratio = ratio or DOWNSCALES.get(type(latent).__name__, 8)
        side = max(size // int(ratio), 1)
        frame = (1,) if latent.latent_dimensions == 3 else ()
        return (latent.latent_channels, *frame, side, side)

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(count, *self._latent_shape(), generator=generator).to(self.model.load_device)
        sigma = sigma.to(noise.device)
        highest = float(self._sampling.sigma_max)
        is_highest = bool(sigma > highest or abs(float(sigma) - highest) < 1e-5 * highest)
        return self._sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), is_highest)

    # --- prediction ---

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        network, count = self.model.model.diffusion_model, len(entries)
        if not torch.is_grad_enabled():
            return self._denoised(x, sigma, entries, max(int(self._room() / self._activations(1)), 1), 1)
        factor = -(-self.step_bytes(count) // int(self._activations(count)))
        with checkpointed(network) if self._must_save(count) else nullcontext():
            return self._denoised(x, sigma, entries, count, factor, unharmed(network))

    def _denoised(
        self, x: Tensor, sigma: Tensor, entries: Sequence[Entry], most: int, factor: int,
        keeping: AbstractContextManager[None] | None = None,
    ) -> Tensor:  # fmt: skip
        """`denoise`, with no more than `most` entries at once.

        Args:
            factor: how much more memory than without gradients it takes.
            keeping: what becomes of tensors that autograd saves.
        """
        with torch.inference_mode(False), self._prepared(x[:most], entries, factor) as (inner, options), \
                differentiable(inner), keeping or nullcontext():  # fmt: skip
            device = self.model.load_device
            x, sigma = _ordinary(x).to(device), _ordinary(sigma).to(device, torch.float32)
            encoded = [self._encoded(inner, entry, x[i : i + 1]) for i, entry in enumerate(entries)]
            denoised: list[Tensor] = [x] * len(entries)
            for group in (few for all_of_it in grouped(encoded) for few in _pieces(all_of_it, most)):
                rows = torch.tensor(group, device=device)
                condition = merged([encoded[i] for i in group])
                output = self._predict(inner, condition, x[rows], sigma[rows], options)
                for row, index in enumerate(group):
                    denoised[index] = output[row]
            return torch.stack(denoised)

    @staticmethod
    def _predict(inner: Any, condition: dict[str, Any], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        """ComfyUI's prediction for one entry, as its sampling function asks for it at CFG 1."""
        patched = options.get("sampler_calc_cond_batch_function")
        if patched is not None:
            asked = {"conds": [[condition], None], "input": x, "sigma": sigma, "model": inner, "model_options": options}
            return patched(asked)[0]
        return comfy.samplers.calc_cond_batch(inner, [[condition]], x, sigma, options)[0]

    @staticmethod
    def _encoded(inner: Any, entry: Entry, x: Tensor) -> dict[str, Any]:
        """An entry as the model takes it: `model_conds` made by the model's own `extra_conds`."""
        converted = {"positive": comfy.sampler_helpers.convert_cond([entry])}
        empty = torch.zeros_like(x)  # sampling starts from an empty latent, which inpainting models look at
        return comfy.samplers.process_conds(inner, x, converted, x.device, empty)["positive"][0]

    @contextmanager
    def _prepared(self, x: Tensor, entries: Sequence[Entry], factor: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model on its device with its patches, and its options with its wrappers, as for a step of sampling.

        `factor`: how much more memory than that step it takes.
        """
        patcher = self.model
        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        options.setdefault("transformer_options", {})
        conditions = {"positive": comfy.sampler_helpers.convert_cond(entries[:1])}
        shape = [x.shape[0] * factor, *x.shape[1:]]
        # ComfyUI loads and patches weights in inference mode; so does this, and leaves them as ComfyUI would
        with torch.inference_mode():
            comfy.sampler_helpers.prepare_model_patcher(patcher, conditions, options)
            inner, _, loaded = comfy.sampler_helpers.prepare_sampling(patcher, shape, conditions, options)
        comfy.samplers.cast_to_load_options(options, device=patcher.load_device, dtype=patcher.model_dtype())
        try:
            patcher.pre_run()
            yield inner, options
        finally:
            comfy.samplers.cast_to_load_options(options, device=patcher.offload_device)
            patcher.cleanup()
            comfy.sampler_helpers.cleanup_models(conditions, loaded)

    # --- memory ---

    def _activations(self, count: int) -> float:
        """ComfyUI's estimate of bytes beside the weights for a prediction without gradients.

        The model's own: a patcher with dynamic VRAM adds what it would like to have.
        """
        return max(float(self.model.model.memory_required([count, *self._latent_shape()])), 1.0)

    @cached_property
    def _kept(self) -> Kept:
        """What one prediction with gradients keeps, measured on one; that first one tells whether MODEL and CLIP fit.

        Raises ValueError when they are of different models.
        """
        found, (entry,) = Kept(), self.encode([EXAMPLE])
        sigma = self.sigmas(2)[:1]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                text = {name: tensor.clone().requires_grad_(True) for name, tensor in text_blocks(entry).items()}
                x = self.start(1, sigma[0], Generator().manual_seed(0))
                keeping = counted(self.model.model.diffusion_model, found)
                self._denoised(x, sigma, [with_blocks(entry, text)], 1, 1, keeping)
        except RuntimeError as error:
            if isinstance(error, comfy.model_management.OOM_EXCEPTION) or not _MISFIT.search(str(error)):
                raise
            widths = ", ".join(f"{tensor.shape[-1]} numbers a token" if name == CROSS_ATTENTION else f"{name} of "
                               f"{tensor.shape[-1]}" for name, tensor in text_tensors(entry).items())  # fmt: skip
            raise ValueError(
                f"This MODEL cannot read what this CLIP writes ({type(self.model.model).__name__} was given {widths}): "
                "connect MODEL and CLIP of the same checkpoint."
            ) from error
        return found

    def _room(self) -> float:
        """Bytes beside the weights; ComfyUI keeps those outside of the device when they leave too little."""
        total = comfy.model_management.get_total_memory(self.model.load_device)
        return max(total - self.model.model_size(), total / 3)

    def _must_save(self, count: int) -> bool:
        """Whether all that so many predictions keep is more than there is room for."""
        return self._activations(count) + count * self._kept.everything > self._room()

    def fits(self, count: int) -> int:
        if not self._must_save(count):
            return count
        return max(min(count, int(self._room() / (self._activations(1) + self._kept.checkpointed))), 1)

    def step_bytes(self, count: int) -> int:
        each = self._kept.checkpointed if self._must_save(count) else self._kept.everything
        return int(self._activations(count) + count * each)

    # --- pictures ---

    def decode(self, latents: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode():
            pictures = self.vae.decode(self.model.model.process_latent_out(latents.detach().float()))
        with torch.inference_mode(False):
            pictures = pictures.clone().float().cpu()
            if pictures.ndim == 5:  # video: the first frame
                pictures = pictures[:, 0]
            return pictures[..., :3].movedim(-1, 1).clamp(0, 1)

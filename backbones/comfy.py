"""Any MODEL, CLIP and VAE of ComfyUI as a backbone.

Everything runs through ComfyUI's own machinery: its text encoding, its conditioning batches, its model patches and
wrappers, its memory management. Nothing here knows an architecture.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from inspect import signature
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Generator, Tensor

from ..region.blocks import CROSS_ATTENTION, class_names
from ..region.conditioning import Entry, text_tensors
from .comfy_encoding import Together
from .comfy_gradients import checkpointed, differentiable, differentiable_attention, unharmed
from .kept import Kept, Needs, counted, step_inputs

SCHEDULER = "normal"
DEFAULT_SIZE = 512  # pixels; a latent format may name its own as `training_size`
# Pixels to a latent's one, by its format, for versions of ComfyUI whose formats do not say; 8 elsewhere.
DOWNSCALES = {"SC_Prior": 42, "SC_B": 4, "LTXV": 32, "LTXAV": 32, "HunyuanImage21": 32, "Wan22": 16, "Flux2": 16,
              "HunyuanVideo15": 16, "ChromaRadiance": 1}  # fmt: skip
GUARD = "safe_region"  # key of a guard's wrappers and callbacks in a model
WORDS_AGAIN = "t5xxl_ids"  # the option that holds the words themselves
EXAMPLE = "a photo of a woman with a red umbrella on a street in the rain, at night"  # of usual length, to measure with

# Whether models that draw several streams at once, as LTX-2 does, are told what shapes they have.
_KNOWS_STREAMS = "latent_shapes" in signature(comfy.samplers.process_conds).parameters
# Models that no region can learn on, by class.
UNLEARNABLE = {"MiniMaxH3": "draws pictures and their sound together, in two streams of latents"}

# torch's errors about tensors that do not fit together; those about memory speak of sizes too
_MISFIT = re.compile(r"^(?!.*(memory|buffer)).*(shape|size|dimension)", re.IGNORECASE | re.DOTALL)


def _ordinary(value: Any, device: Any = None) -> Any:
    """The value with its tensors copied out of inference mode, and to a device if one is given."""
    if isinstance(value, Tensor):
        moved = value.to(device) if device else value
        return moved.clone() if moved.is_inference() else moved
    if isinstance(value, (list, tuple)):
        return type(value)(_ordinary(item, device) for item in value)
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


def without_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a prompt without its words themselves, which Anima reads beside their states."""
    return {name: value for name, value in options.items() if not name.startswith("t5xxl_")}


def unguarded(model: Any) -> Any:
    """The model without its guards, which refuse whatever does not run through a sampler. None stays None."""
    if model is None or not any(GUARD in by_key for by_key in model.wrappers.values()):
        return model
    model = model.clone()
    for by_key in (*model.wrappers.values(), *model.callbacks.values()):
        by_key.pop(GUARD, None)
    return model


class ComfyBackbone:
    """ComfyUI's MODEL (a ModelPatcher), CLIP and VAE; `model` and `vae` may be None."""

    def __init__(self, model: Any, clip: Any, vae: Any = None, size: int = 0) -> None:
        """`size` is the width and height in pixels to learn at; 0 is the model's own."""
        self.model, self.clip, self.vae, self.size = unguarded(model), clip, vae, size
        self.can_denoise = model is not None
        self.can_decode = model is not None and vae is not None
        self._signature: dict[str, Any] | None = None
        self._together = Together(clip, self._entry)
        if model is not None and (why := UNLEARNABLE.get(type(model.model).__name__)):
            raise ValueError(f"No region can be learned on this model yet: it {why}.")
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
            self._signature = {"name": class_names(type(encoder))[0], "parts": parts, "blocks": blocks}
        return self._signature

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        return self._together.encode(prompts)

    def _entry(self, tokens: Any) -> Entry:
        """A prompt's tokens, encoded."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode():
            # several entries come only from hooks that are scheduled over sampling; the first one stands for all
            tensor, options = self.clip.encode_from_tokens_scheduled(tokens)[0]
            # hooks would patch weights within a step, under the gradients
            options = {name: value for name, value in options.items() if name != "hooks"}
            tensor, options = self._as_read(tensor, options)
        with torch.inference_mode(False):
            # --gpu-only leaves text on the card, where what is learned from is neither needed nor has room
            return [_ordinary(tensor, "cpu"), {name: _ordinary(value, "cpu") for name, value in options.items()}]

    def _as_read(self, text: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Text as the network's blocks read it, where it makes that out of states and the words themselves (Anima)."""
        if WORDS_AGAIN not in options:
            return text, options
        if self.model is None:
            raise ValueError("This model (Anima) makes its text from what the CLIP writes: connect its MODEL, too.")
        comfy.model_management.load_models_gpu([self.model])
        read = self.model.model.extra_conds(cross_attn=text, device=self.model.load_device, **options)["c_crossattn"]
        return read.cond, without_words(options)

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
        streams = {"latent_shapes": [x.shape]} if _KNOWS_STREAMS else {}
        return comfy.samplers.process_conds(inner, x, converted, x.device, empty, **streams)["positive"][0]

    @contextmanager
    def _prepared(self, x: Tensor, entries: Sequence[Entry], factor: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model on its device with its patches, and its options with its wrappers, as for a step of sampling.

        `factor`: how much more memory than that step it takes.
        """
        patcher = self.model
        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        options.setdefault("transformer_options", {})
        if torch.is_grad_enabled():
            options["transformer_options"]["optimized_attention_override"] = differentiable_attention
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
    def _needs(self) -> Needs:
        """What predictions with gradients take, measured on them; the first one tells whether MODEL and CLIP fit.

        Raises ValueError when they are of different models.
        """
        found: list[Kept] = []
        (entry,) = self.encode([EXAMPLE])
        try:
            for count in (1, 2):
                self._count(entry, count, found)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            if isinstance(error, comfy.model_management.OOM_EXCEPTION):
                if not found:
                    raise
                return Needs(found[0], found[0].twice)
            name, told = type(self.model.model).__name__, str(error).strip().split("\n")[0][:200]
            if not isinstance(error, RuntimeError) or not _MISFIT.search(str(error)):
                raise ValueError(
                    f"No region can be learned on this model ({name}): it could not be asked for a picture with "
                    f'gradients, and said "{told}".'
                ) from error
            widths = ", ".join(f"{tensor.shape[-1]} numbers a token" if name == CROSS_ATTENTION else f"{name} of "
                               f"{tensor.shape[-1]}" for name, tensor in text_tensors(entry).items())  # fmt: skip
            raise ValueError(
                f"This MODEL cannot read what this CLIP writes ({name} was given {widths}): "
                "connect MODEL and CLIP of the same checkpoint."
            ) from error
        return Needs(*found)

    def _count(self, entry: Entry, count: int, found: list[Kept]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            keeping = counted(self.model.model.diffusion_model, found)
            self._denoised(*step_inputs(self, entry, count), count, 1, keeping)

    def _room(self) -> float:
        """Bytes beside the weights; ComfyUI keeps those outside of the device when they leave too little."""
        total = comfy.model_management.get_total_memory(self.model.load_device)
        return max(total - self.model.model_size(), total / 3)

    def _must_save(self, count: int) -> bool:
        """Whether so many predictions must keep few activations: all would be more than there is room for, or have the
        weights in them a second time, as where these are cast or moved as they are needed."""
        return self._needs.one.copies > 0 or self._needs.step(count, False) > self._room()

    def fits(self, count: int) -> int:
        return self._needs.fits(count, self._room()) if self._must_save(count) else count

    def step_bytes(self, count: int) -> int:
        return self._needs.step(count, self._must_save(count))

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

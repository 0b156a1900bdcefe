"""Any Stable Diffusion 1.x, SDXL, SD3 or Flux pipeline of diffusers as a backbone, without ComfyUI.

The networks are the pipeline's own, called as the pipeline calls them. Only the text is laid out as ComfyUI lays it out
(chunks, padding, which layer, what is beside what), so that a region learned here holds there, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..region.blocks import POOLED
from ..region.conditioning import Entry, text_tensors
from ..region.words import Token, decoder, tokens_of
from .kept import Needs, needs_of

DEFAULT_SIZE = 512  # pixels at most, unless the user asks for more
CHUNK = 75  # words of a CLIP chunk, beside its start and its end
FLUX_GUIDANCE = 3.5  # as ComfyUI has it where nothing else is said
AT_ONCE = 8  # predictions without gradients
AT_ONCE_TEXT = 64  # chunks or prompts

# (pipeline, x [B, C, H, W], time [B], text [B, T, D], pooled text [B, P]) -> the network's output, as large as x
Network = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def _sd(pipe: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    return pipe.unet(x, time, encoder_hidden_states=text, return_dict=False)[0]


def _sdxl(pipe: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    sizes = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return pipe.unet(x, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def _sd3(pipe: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    return pipe.transformer(
        hidden_states=x, timestep=time * pipe.scheduler.config.num_train_timesteps, encoder_hidden_states=text,
        pooled_projections=pooled, return_dict=False,
    )[0]  # fmt: skip


def _flux(pipe: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    guided = pipe.transformer.config.guidance_embeds
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(x, count, channels, height, width), timestep=time,
        guidance=torch.full_like(time, FLUX_GUIDANCE) if guided else None,
        encoder_hidden_states=text, pooled_projections=pooled, txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, x.device, x.dtype), return_dict=False,
    )[0]  # fmt: skip
    return pipe._unpack_latents(packed, height, width, 1)


@dataclass(frozen=True)
class Family:
    """One class of pipeline. Parts of the text encoder have ComfyUI's names."""

    name: str  # as in the names of region files
    encoder: str  # ComfyUI's class
    predict: Network
    network: str  # the pipeline's attribute
    parts: dict[str, str]  # what the names of their attributes end in: `text_encoder_2` is "_2"
    states: tuple[str, ...] = ()  # CLIPs whose token states are used, side by side
    pooled: tuple[str, ...] = ("clip_l",)
    last: bool = False  # token states are those of the last layer, normalised, and not of the one before it
    shortest: int = 0  # tokens of T5


FAMILIES = {
    "StableDiffusionPipeline": Family("sd15", "SD1ClipModel", _sd, "unet", {"clip_l": ""}, ("clip_l",), last=True),
    "StableDiffusionXLPipeline": Family(
        "sdxl", "SDXLClipModel", _sdxl, "unet", {"clip_l": "", "clip_g": "_2"}, ("clip_l", "clip_g"), ("clip_g",)
    ),
    "StableDiffusion3Pipeline": Family(
        "sd3", "SD3ClipModel", _sd3, "transformer", {"clip_l": "", "clip_g": "_2", "t5xxl": "_3"}, ("clip_l", "clip_g"),
        ("clip_l", "clip_g"), shortest=77,
    ),
    "FluxPipeline": Family("flux", "FluxClipModel", _flux, "transformer", {"clip_l": "", "t5xxl": "_2"}, shortest=256),
}  # fmt: skip


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # of several processes each has its own
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _configuration(file: str | Path) -> Path:
    """The folder with a checkpoint's configuration and tokenizer, of those that diffusers has downloaded before."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        source = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except Exception as error:  # whatever a file raises that is no checkpoint
        raise ValueError(f"{file} could not be read as a checkpoint: {str(error).splitlines()[0]}") from error
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{file} needs the configuration and the tokenizer of {source}, which are not on this machine: give "
            "the folder of a pipeline of that kind, too."
        ) from None


def load_pipeline(path: str | Path | None, checkpoint: str | Path | None = None, device: str | None = None,
                  dtype: str | None = None) -> Any:  # fmt: skip
    """The pipeline in a folder, on the accelerator if there is one. Nothing is downloaded.

    Args:
        checkpoint: a single file with the weights; only configuration and tokenizer are the folder's then, or those
            that diffusers knows where there is no folder.
        dtype: of the diffusion model, as torch names it.

    Raises ValueError when there is none, or none of a supported class; ImportError without diffusers.
    """
    folder = Path(path) if path else _configuration(checkpoint)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers pipeline: name a folder that holds a model_index.json.")
    name = str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name"))
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}, which is not supported: use a {' or a '.join(FAMILIES)}.")
    import diffusers

    family, device = FAMILIES[name], device or _device()
    # bfloat16, whose gradients do not vanish as float16's do, for what is large. CLIP's states are those of ComfyUI in
    # float32 only, and SDXL's VAE overflows in less.
    short = torch.float32 if device == "cpu" else torch.bfloat16
    if dtype:
        short = getattr(torch, dtype)
    dtypes = {"default": torch.float32, family.network: short, f"text_encoder{family.parts.get('t5xxl')}": short}
    weights = list((folder / family.network).glob("*.safetensors"))
    more = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    try:
        if checkpoint:
            pipe = getattr(diffusers, name).from_single_file(
                str(checkpoint), config=str(folder), local_files_only=True, torch_dtype=torch.float32, **more
            )
            for part in dtypes.keys() & vars(pipe).keys():
                getattr(pipe, part).to(short)
        else:
            pipe = getattr(diffusers, name).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=dtypes,
                variant="fp16" if weights and all(".fp16" in file.name for file in weights) else None, **more,
            )  # fmt: skip
    except Exception as error:  # also what diffusers raises for a class or a part that is not there
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{checkpoint or folder} could not be loaded: {said}") from error
    pipe = pipe.to(device)
    if device != "cpu":
        getattr(pipe, family.network).enable_gradient_checkpointing()
    return pipe


class DiffusersBackbone:
    """Noise levels as k-diffusion counts them: x = x_0 + sigma * noise for UNets, and for the transformers, which are
    flow models, x = (1 - sigma) x_0 + sigma * noise.
    """

    def __init__(self, pipe: Any, size: int = 0) -> None:
        """Args:
            pipe: the pipeline, or an object of that name with its text encoders and tokenizers only.
            size: width and height in pixels to learn at; 0 is the model's own, `DEFAULT_SIZE` at most.

        Raises ValueError for what a region cannot be learned on.
        """  # fmt: skip
        self.pipe, self.size, self.family = pipe, size, FAMILIES[type(pipe).__name__]
        self.network = getattr(pipe, self.family.network, None)
        self.can_denoise = self.network is not None
        self.can_decode = self.can_denoise and getattr(pipe, "vae", None) is not None
        for module in vars(pipe).values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        if self.family.last and pipe.text_encoder.config.hidden_size == 1024:
            raise ValueError(
                "This is Stable Diffusion 2.x, whose pipeline lacks the layer that ComfyUI's pooled text comes from: "
                "train its regions in ComfyUI."
            )
        if self.can_denoise and not self._flow:
            if not hasattr(pipe.scheduler, "alphas_cumprod"):
                raise ValueError(f"{type(pipe.scheduler).__name__} is not supported: use one that has alphas_cumprod.")
            if pipe.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
                raise ValueError(f"A prediction of {pipe.scheduler.config.prediction_type} is not supported.")

    @property
    def _flow(self) -> bool:
        return self.family.network == "transformer"

    @property
    def _device(self) -> torch.device:
        return self.network.device

    # --- text ---

    def _part(self, part: str) -> tuple[Any, Any]:
        """Tokenizer and encoder; both are None where the pipeline has none."""
        ending = self.family.parts[part]
        return getattr(self.pipe, f"tokenizer{ending}"), getattr(self.pipe, f"text_encoder{ending}")

    def _parts(self) -> list[str]:
        return [part for part in self.family.parts if self._part(part)[1] is not None]

    def signature(self) -> dict[str, Any]:
        blocks = {name: tensor.shape[-1] for name, tensor in text_tensors(self.encode([""])[0]).items()}
        return {"name": self.family.encoder, "parts": self._parts(), "blocks": blocks}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        """As ComfyUI does: chunks of 77 tokens follow one another, then T5's. Weights in brackets count as words."""
        parts, family = self._parts(), self.family
        clips = {part: self._clip(part, prompts) for part in parts if part != "t5xxl"}
        t5 = self._t5(prompts) if "t5xxl" in parts else None
        entries = []
        for i in range(len(prompts)):
            rows = [torch.cat([clips[part][i][0] for part in family.states], -1)] if family.states else []
            if family.shortest:  # CLIP's tokens are as wide as T5's, whether it is there or not
                width = t5[i].shape[-1] if t5 else self.network.config.joint_attention_dim
                rows = [nn.functional.pad(states, (0, width - states.shape[-1])) for states in rows]
            pooled = torch.cat([clips[part][i][1] for part in family.pooled], -1)
            entries.append([torch.cat([*rows, *(t5[i : i + 1] if t5 else [])], 1), {POOLED: pooled}])
        return entries

    def _clip(self, part: str, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Token states [1, 77k, D] and pooled text [1, P] of each prompt."""
        tokenizer, encoder = self._part(part)
        # ComfyUI never projects CLIP-L's pooled text, even where the pipeline has a projection for it (SD3)
        core = getattr(encoder, "text_model", encoder)
        chunks = [_chunks(tokenizer, prompt, tokenizer.eos_token_id if part == "clip_l" else 0) for prompt in prompts]
        states, pooled = [], []
        for ids in torch.tensor([row for rows in chunks for row in rows]).split(AT_ONCE_TEXT):
            found = core(input_ids=ids.to(encoder.device), output_hidden_states=True)
            states.append(found.last_hidden_state if self.family.last else found.hidden_states[-2])
            pooled.append(encoder.text_projection(found.pooler_output) if part == "clip_g" else found.pooler_output)
        counts = [len(rows) for rows in chunks]
        every, first = (torch.cat(found).float().cpu().split(counts) for found in (states, pooled))
        return [(rows.reshape(1, -1, rows.shape[-1]), pool[:1]) for rows, pool in zip(every, first)]

    def _t5(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token states [1, T, D] of each prompt, padding included, which nothing masks."""
        tokenizer, encoder = self._part("t5xxl")
        read = [[*_words(tokenizer, prompt), tokenizer.eos_token_id] for prompt in prompts]
        padded = [ids + [0] * (self.family.shortest - len(ids)) for ids in read]
        states: list[Any] = [None] * len(prompts)
        for rows in _alike([len(ids) for ids in padded], AT_ONCE_TEXT):
            ids = torch.tensor([padded[i] for i in rows], device=encoder.device)
            for i, found in zip(rows, encoder(input_ids=ids).last_hidden_state.float().cpu().split(1)):
                states[i] = found
        return states

    def words(self, prompt: str) -> list[Token]:
        """What stands at each place of an encoded prompt."""
        found: list[Token] = []
        if self.family.states:  # side by side: the first tokenizer speaks for all
            tokenizer = self._part(self.family.states[0])[0]
            found += _tokens(tokenizer, [word for row in _chunks(tokenizer, prompt, 0) for word in row], prompt)
        if "t5xxl" in self._parts():
            tokenizer = self._part("t5xxl")[0]
            ids = [*_words(tokenizer, prompt), tokenizer.eos_token_id]
            found += _tokens(tokenizer, ids + [0] * (self.family.shortest - len(ids)), prompt)
        return found

    # --- noise ---

    def _side(self) -> int:
        """Width and height of latents: even, since transformers look at two by two."""
        scale = self.pipe.vae_scale_factor
        own = (self.network.config.get("sample_size") or self.pipe.default_sample_size) * scale
        return max((self.size or min(own, DEFAULT_SIZE)) // scale // 2 * 2, 2)

    @cached_property
    def _levels(self) -> Tensor:
        """Sigma of each timestep of a UNet, rising."""
        # a zero terminal signal has no sigma: it becomes the least one that schedulers use
        alphas = self.pipe.scheduler.alphas_cumprod.to(self._device, torch.float32).clamp(min=2**-24)
        return ((1 - alphas) / alphas).sqrt()

    def _shift(self) -> float:
        """How far a flow model's schedule leans towards noise."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * ((self._side() // 2) ** 2 - config.base_image_seq_len)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def sigmas(self, steps: int) -> Tensor:
        if self._flow:
            times, shift = torch.linspace(1, 0, steps + 1, device=self._device), self._shift()
            return shift * times / (1 + (shift - 1) * times)
        timesteps = torch.linspace(len(self._levels) - 1, 0, steps).round().long()
        return torch.cat([self._levels[timesteps], self._levels.new_zeros(1)])

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        side = self._side()
        noise = torch.randn(count, self.pipe.vae.config.latent_channels, side, side, generator=generator)
        sigma = sigma.to(self._device)
        return noise.to(self._device) * (sigma if self._flow else (1 + sigma**2).sqrt())

    # --- prediction ---

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        x, sigma = x.to(self._device, torch.float32), sigma.to(self._device, torch.float32)
        denoised: list[Any] = [None] * len(entries)
        most = len(entries) if torch.is_grad_enabled() else AT_ONCE
        for rows in _alike([entry[0].shape for entry in entries], most):
            text = torch.cat([entries[i][0] for i in rows]).to(x.device)
            pooled = torch.cat([entries[i][1][POOLED] for i in rows]).to(x.device)
            for i, found in zip(rows, self._denoised(x[rows], sigma[rows], text, pooled)):
                denoised[i] = found
        return torch.stack(denoised)

    def _denoised(self, x: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        if self._flow:
            return x - level * self._output(x, sigma, text, pooled)
        length = (level**2 + 1).sqrt()
        time = (sigma.log()[:, None] - self._levels.log()).abs().argmin(-1)
        output = self._output(x / length, time, text, pooled)
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            return x - level * output
        return x / length**2 - output * level / length

    def _output(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        dtype = self.network.dtype
        return self.family.predict(self.pipe, x.to(dtype), time, text.to(dtype), pooled.to(dtype)).float()

    def fits(self, count: int) -> int:
        """On an accelerator one at a time: nobody says there how much a prediction takes."""
        return count if self._device.type == "cpu" else 1

    @cached_property
    def _needs(self) -> Needs:
        """What predictions with gradients take, measured with all that they would compute again."""
        saves = self.network.is_gradient_checkpointing
        if saves:
            self.network.disable_gradient_checkpointing()
        try:
            return needs_of(self, self.network)
        finally:
            if saves:
                self.network.enable_gradient_checkpointing()

    def step_bytes(self, count: int) -> int:
        return self._needs.step(count, saving=self.network.is_gradient_checkpointing)

    # --- pictures ---

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
        pictures = torch.cat([vae.decode(one, return_dict=False)[0].float().cpu() for one in latents.split(1)])
        return (pictures / 2 + 0.5).clamp(0, 1)


def _words(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]


def _tokens(tokenizer: Any, ids: Sequence[int], prompt: str) -> list[Token]:
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    read = decoder(pieces.values())
    none = {0, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}  # 0 is padding, too
    return tokens_of(ids, [number in none for number in ids], [], lambda number: read(pieces[number]), prompt)


def _chunks(tokenizer: Any, prompt: str, padding: int) -> list[list[int]]:
    """A prompt as rows of 77 tokens, each with a start and an end of its own."""
    words = _words(tokenizer, prompt)
    rows = [words[begin : begin + CHUNK] for begin in range(0, max(len(words), 1), CHUNK)]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[start, *row, end, *[padding] * (CHUNK - len(row))] for row in rows]


def _alike(keys: Sequence[Any], most: int) -> list[list[int]]:
    """Indices of equal keys, in groups of at most so many."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return [rows[begin : begin + most] for rows in groups.values() for begin in range(0, len(rows), most)]

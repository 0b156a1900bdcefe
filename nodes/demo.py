"""The embedded demo model as ordinary MODEL, CLIP and VAE objects of ComfyUI."""
from __future__ import annotations

import logging
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..demo.model import WEIGHTS, DemoModel, load_demo
from ..demo.networks import DOWNSCALE, LATENT_CHANNELS, TEXT_CONFIG, TEXT_WIDTH, Autoencoder, UNet
from .common import schema

CLIP_ROWS = 49_408  # ComfyUI's CLIP class has a fixed number of tokens
PICTURE_SIZE = 128


class DemoUNet(UNet):
    """The UNet with the arguments that ComfyUI passes to a diffusion model."""

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        return super().forward(x, timesteps, context)


class DemoLatent(comfy.latent_formats.LatentFormat):
    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = DOWNSCALE
    training_size = PICTURE_SIZE


class DemoConfig(comfy.supported_models_base.BASE):
    latent_format = DemoLatent
    supported_inference_dtypes = [torch.float32]  # noqa: RUF012 - as ComfyUI declares it
    memory_usage_factor = 0.1


def demo_unet(demo: DemoModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL: v-prediction on Stable Diffusion's schedule, which is ComfyUI's default."""
    config = DemoConfig({"disable_unet_model_creation": True, "in_channels": LATENT_CHANNELS, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    factors = preview_factors(demo.autoencoder)
    config.latent_format.latent_rgb_factors, config.latent_format.latent_rgb_factors_bias = factors
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)
    model.diffusion_model = DemoUNet()
    model.diffusion_model.load_state_dict(demo.unet.state_dict())
    model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


@torch.no_grad()
def preview_factors(autoencoder: Autoencoder) -> tuple[list[list[float]], list[float]]:
    """Least-squares colours in -1..1 of latents, for ComfyUI's quick previews while sampling."""
    coarse = torch.randn(16, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(coarse, scale_factor=4)
    colours = F.avg_pool2d(autoencoder.decode(latents).clamp(0, 1), DOWNSCALE) * 2 - 1
    known = F.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, 2)).solution
    return solution[:-1].tolist(), solution[-1].tolist()


class DemoTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            tokenizer_path=str(WEIGHTS / "tokenizer"), embedding_directory=embedding_directory,
            embedding_size=TEXT_WIDTH, tokenizer_data=tokenizer_data or {},
        )  # fmt: skip


class DemoClipTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=DemoTokenizer)


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, end: int = 0) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, return_projected_pooled=False,
            textmodel_json_config={**TEXT_CONFIG, "eos_token_id": end, "layer_norm_eps": 1e-5},
            special_tokens={"start": end - 1, "end": end, "pad": end},
        )  # fmt: skip


class SafeRegionDemoCLIP(comfy.sd1_clip.SD1ClipModel):
    """ComfyUI's own CLIP classes at the demo's size."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, end: int = 0) -> None:
        super().__init__(device, dtype, model_options or {}, clip_model=DemoTextModel, end=end)


def demo_clip(demo: DemoModel) -> comfy.sd.CLIP:
    """CLIP: weights in brackets, embeddings, long prompts and clip skip work as with any other."""
    state = {name: tensor.float() for name, tensor in demo.text_state_dict().items()}
    name = "text_model.embeddings.token_embedding.weight"
    rows = len(state[name])
    state[name] = F.pad(state[name], (0, 0, 0, CLIP_ROWS - rows))
    target = comfy.supported_models_base.ClipTarget(DemoClipTokenizer, SafeRegionDemoCLIP)
    target.params = {"end": rows - 1}
    embeddings = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.CLIP(target, embedding_directory=embeddings, model_options={"dtype": torch.float32})
    clip.load_sd(state)
    return clip


class DemoVAE(comfy.sd.VAE):
    """ComfyUI's VAE around the demo's autoencoder."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        # Without weights ComfyUI's class sets its defaults, whatever they are in this version, warns and returns.
        logger = logging.getLogger()
        logger.addFilter(_not_about_missing_weights)
        try:
            super().__init__(sd={})
        finally:
            logger.removeFilter(_not_about_missing_weights)
        self.first_stage_model = Autoencoder().eval().requires_grad_(False)
        self.first_stage_model.load_state_dict(autoencoder.state_dict())
        self.latent_channels = LATENT_CHANNELS
        self.downscale_ratio = self.upscale_ratio = DOWNSCALE
        self.process_input = lambda picture: picture
        self.process_output = lambda picture: picture.clamp(0, 1)
        self.memory_used_encode = lambda shape, dtype: 400 * shape[2] * shape[3]
        self.memory_used_decode = lambda shape, dtype: 400 * shape[2] * shape[3] * DOWNSCALE**2
        self.working_dtypes = [torch.float32]
        self.vae_dtype = torch.float32
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )
        self.size = None
        self.model_size()


def _not_about_missing_weights(record: logging.LogRecord) -> bool:
    return "No VAE weights" not in record.getMessage()


class SafeRegionDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionDemoModel",
            display_name="Safe Region Demo Model",
            description="A tiny text-to-image model that comes with the pack (no download, runs on any CPU): "
            "pictograms of everyday things, animals, people and weapons at 128x128, to try safe regions on.",
            search_aliases=["safe region", "demo", "tiny model"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model, for a sampler at 128x128."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        try:
            with torch.inference_mode(False), torch.no_grad():
                demo = load_demo()
                return io.NodeOutput(demo_unet(demo), demo_clip(demo), DemoVAE(demo.autoencoder))
        except FileNotFoundError as error:
            raise ValueError(
                f"The demo model's weights are missing from this installation ({error}): install the pack again."
            ) from None

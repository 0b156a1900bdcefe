"""A test-only node pack: a small random MODEL and CLIP that share nothing with the demo model.

Other widths, other latents, weights with gradients, its own class of text encoder with a pooled output that the
diffusion model uses, and a choice of prediction types.
"""
from __future__ import annotations

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from comfy_api.latest import ComfyExtension, io

WIDTH, CHANNELS = 96, 32
CONFIG = {
    "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 77, "hidden_act": "gelu", "eos_token_id": 49407,
}  # fmt: skip
TYPES = {name: comfy.model_base.ModelType[kind] for name, kind in
         (("epsilon", "EPS"), ("v", "V_PREDICTION"), ("flow", "FLOW"), ("EDM", "EDM"))}  # fmt: skip
WEIGHTS = {"fp32": (torch.float32, None), "fp16": (torch.float16, torch.float32), "bf16": (torch.bfloat16, None),
           "fp8": (torch.float8_e4m3fn, torch.bfloat16)}  # what they are kept in, and computed in if that is another


class Network(torch.nn.Module):
    def __init__(self, operations=comfy.ops.disable_weight_init):
        super().__init__()
        self.conv_in = operations.Conv2d(4, CHANNELS, 3, padding=1)
        self.pooled = operations.Linear(WIDTH + 1, CHANNELS)
        self.query, self.key_value = operations.Linear(CHANNELS, WIDTH), operations.Linear(WIDTH, 2 * CHANNELS)
        self.key = operations.Linear(WIDTH, WIDTH)
        self.conv_out = operations.Conv2d(CHANNELS, 4, 3, padding=1)

    @property
    def dtype(self):
        return self.conv_in.weight.dtype

    def forward(self, x, timesteps, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        time = (timesteps[:, None] / 1000).to(x)
        h = self.conv_in(x) + self.pooled(torch.cat([y, time], -1))[:, :, None, None]
        query = self.query(h.flatten(2).transpose(1, 2))
        weights = (query @ self.key(context).transpose(1, 2) / WIDTH**0.5).softmax(-1)
        value = (weights @ self.key_value(context)).transpose(1, 2).unflatten(-1, x.shape[2:])
        scale, shift = value.chunk(2, dim=1)
        return self.conv_out(torch.nn.functional.silu(h * scale + shift))


class Model(comfy.model_base.BaseModel):
    def encode_adm(self, **kwargs):
        return kwargs["pooled_output"]


class Config(comfy.supported_models_base.BASE):
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 0.1


class TextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device, dtype=dtype, textmodel_json_config=dict(CONFIG), model_options=model_options)


class OtherTextEncoder(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device, dtype, model_options, clip_name="o", clip_model=TextModel)


class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006
        super().__init__(embedding_directory, tokenizer_data, clip_name="o")


def fill(module: torch.nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(noise * (scale if weight.ndim > 1 else 0.1) + float("norm" in name and "weight" in name))


class TestOtherModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestOtherModel",
            category="testing",
            inputs=[
                io.Combo.Input("prediction", options=list(TYPES)),
                io.Combo.Input("weights", options=list(WEIGHTS), default="fp32", optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def execute(cls, prediction, weights="fp32"):
        kept, computed = WEIGHTS[weights]
        config = Config({"disable_unet_model_creation": True, "in_channels": 4, "adm_in_channels": WIDTH})
        config.set_inference_dtype(kept, computed)
        model = Model(config, TYPES[prediction])
        model.diffusion_model = Network(comfy.ops.manual_cast if computed else comfy.ops.disable_weight_init)
        fill(model.diffusion_model, 0, 0.15)
        model.diffusion_model.to(kept).requires_grad_(True)
        patcher = comfy.model_patcher.ModelPatcher(
            model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        )
        target = comfy.supported_models_base.ClipTarget(Tokenizer, OtherTextEncoder)
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
        fill(clip.cond_stage_model, 1, 0.1)
        return io.NodeOutput(patcher, clip)


class TestChecksum(io.ComfyNode):
    """The exact weights of a MODEL and a CLIP as text, so that a test can compare them before and after."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestChecksum",
            category="testing",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Custom("SAFE_REGION").Input("after", optional=True),  # only to wait for it
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, model, clip, after=None):
        import hashlib

        digest = hashlib.sha256()
        for module in (model.model, clip.cond_stage_model):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        grads = sum(p.grad is not None for p in model.model.parameters())
        return io.NodeOutput(ui={"text": [digest.hexdigest(), str(grads)]})


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestOtherModel, TestChecksum]


async def comfy_entrypoint():
    return TestExtension()

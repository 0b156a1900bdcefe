"""The demo model's networks: a latent UNet with cross-attention, an autoencoder and small picture readers.

Plain torch, so that the same classes run in ComfyUI, in training and in tests.
Shapes: pictures [B, 3, 128, 128] in 0..1, latents [B, 8, 16, 16] of unit variance, text states [B, T, 192].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 8
TEXT_WIDTH = 192
DOWNSCALE = 8

# Hyper-parameters of the text encoder, in the words of transformers' CLIPTextConfig.
TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [B, width] of timesteps in 0..999 ("Attention Is All You Need", as in DDPM)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_time: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(8, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm_out = nn.GroupNorm(8, c_out)
        self.conv_out = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h)))


class Attention(nn.Module):
    """Self-attention over pixels, or cross-attention from pixels to text states."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(context, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        source = h if context is None else context
        q, (k, v) = self.query(h), self.key_value(source).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h)


class TextBlock(nn.Module):
    """Self-attention (optional), cross-attention to the text and a feed-forward layer on a feature map."""

    def __init__(self, channels: int, heads: int, look_around: bool) -> None:
        super().__init__()
        self.self_attention = Attention(channels, channels, heads) if look_around else None
        self.cross_attention = Attention(channels, TEXT_WIDTH, heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        if self.self_attention is not None:
            h = self.self_attention(h)
        h = self.cross_attention(h, context)
        h = h + self.feed_forward(h)
        return h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Predicts v (Salimans & Ho, 2022) from noisy latents, timesteps 0..999 and text states."""

    def __init__(self, c_fine: int = 80, c_coarse: int = 160, c_time: int = 256) -> None:
        super().__init__()
        self.c_time = c_time
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU())
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, c_fine, 3, padding=1)
        self.down_fine = ResBlock(c_fine, c_fine, c_time)
        self.text_fine = TextBlock(c_fine, 4, look_around=False)
        self.downsample = nn.Conv2d(c_fine, c_coarse, 3, stride=2, padding=1)
        self.down_coarse = nn.ModuleList(ResBlock(c_coarse, c_coarse, c_time) for _ in range(2))
        self.text_down = nn.ModuleList(TextBlock(c_coarse, 4, look_around=True) for _ in range(2))
        self.middle = ResBlock(c_coarse, c_coarse, c_time)
        self.up_coarse = nn.ModuleList(ResBlock(2 * c_coarse, c_coarse, c_time) for _ in range(2))
        self.text_up = nn.ModuleList(TextBlock(c_coarse, 4, look_around=True) for _ in range(2))
        self.upsample = nn.Conv2d(c_coarse, c_fine, 3, padding=1)
        self.up_fine = nn.ModuleList((ResBlock(2 * c_fine, c_fine, c_time), ResBlock(2 * c_fine, c_fine, c_time)))
        self.text_out = TextBlock(c_fine, 4, look_around=False)
        self.norm_out = nn.GroupNorm(8, c_fine)
        self.conv_out = nn.Conv2d(c_fine, LATENT_CHANNELS, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        time = self.time(timestep_embedding(timesteps, self.c_time).to(dtype))
        x, context = x.to(dtype), context.to(dtype)
        first = self.conv_in(x)
        fine = self.text_fine(self.down_fine(first, time), context)
        h = self.downsample(fine)
        skips = []
        for block, text in zip(self.down_coarse, self.text_down):
            h = text(block(h, time), context)
            skips.append(h)
        h = self.middle(h, time)
        for block, text in zip(self.up_coarse, self.text_up):
            h = text(block(torch.cat([h, skips.pop()], dim=1), time), context)
        h = self.upsample(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.text_out(self.up_fine[0](torch.cat([h, fine], dim=1), time), context)
        h = self.up_fine[1](torch.cat([h, first], dim=1), time)
        return self.conv_out(F.silu(self.norm_out(h)))


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU())


class Autoencoder(nn.Module):
    """Pictures to latents an eighth as wide, and back. A batch norm keeps each latent channel at unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), _conv(12, 32), _conv(32, 64, 2), _conv(64, 64), _conv(64, 128, 2), _conv(128, 128),
            nn.Conv2d(128, LATENT_CHANNELS, 1),
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False)
        self.decoder = nn.Sequential(
            _conv(LATENT_CHANNELS, 128), _conv(128, 128), _conv(128, 256), nn.PixelShuffle(2),
            _conv(64, 64), _conv(64, 128), nn.PixelShuffle(2), _conv(32, 32), nn.Conv2d(32, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 to latents [B, 8, H/8, W/8]."""
        return self.norm(self.encoder(pictures * 2 - 1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures in 0..1 (not clamped)."""
        return self.decoder(latents) / 2 + 0.5


class PictureReader(nn.Module):
    """A small CNN that turns pictures into a vector; the judge and the picture half of the tiny CLIP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(3, 24, 2), _conv(24, 48, 2), _conv(48, 96, 2), _conv(96, 96), _conv(96, 160, 2), _conv(160, 160)
        )
        self.out = nn.Linear(2 * 160, width)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 to [B, width]."""
        h = self.features(pictures * 2 - 1)
        return self.out(torch.cat([h.amax((2, 3)), h.mean((2, 3))], dim=-1))

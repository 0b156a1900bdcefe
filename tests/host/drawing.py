"""Prompts in API format that draw with the demo model, with Apply Safe Region and with Guard Model."""
from __future__ import annotations

import io
from typing import Any

from host import Graph
from PIL import Image


def _pixels(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


class Drawing(Graph):
    """A graph on the demo model; `pictures` are the preview nodes whose images are looked at."""

    STEPS = 3

    def __init__(self) -> None:
        super().__init__()
        self.demo = self.add("SafeRegionDemoModel")
        self.region = self.add("SafeRegionLoader", region_name="demo-weapons.safetensors")
        self.pictures: list[str] = []

    def text(self, text: str, clip: list | None = None) -> list:
        return self.add("CLIPTextEncode", clip=clip or self.demo(1), text=text)(0)

    def steered(self, conditioning: list, **options) -> list:
        given = {"strength": 1.0, "mode": "auto", "start": 0.0, "end": 1.0} | options
        return self.add("SafeRegionConditioning", conditioning=conditioning, region=self.region(0), **given)(0)

    def guarded(self, model: list | None = None, **options) -> list:
        given = {"strength": 1.0, "mode": "auto", "start": 0.0, "end": 1.0} | options
        return self.add("SafeRegionGuardModel", model=model or self.demo(0), region=self.region(0), **given)(0)

    def latent(self) -> list:
        return self.add("EmptyLatentImage", width=128, height=128, batch_size=1)(0)

    def decode(self, latent: list) -> None:
        picture = self.add("VAEDecode", samples=latent, vae=self.demo(2))(0)
        self.pictures.append(self.add("PreviewImage", images=picture)()[0])

    def draw(self, positive: list, model: list | None = None, negative: list | None = None, cfg: float = 4.0) -> None:
        self.decode(self.add(
            "KSampler", model=model or self.demo(0), positive=positive, negative=negative or self.text(""),
            latent_image=self.latent(), seed=5, steps=self.STEPS, cfg=cfg, sampler_name="euler", scheduler="normal",
            denoise=1.0,
        )(0))  # fmt: skip

    def run(self, comfy: Any) -> list[bytes]:
        """The pictures as RGB bytes: what else a file holds depends on what ran before."""
        return [picture for pictures in self.run_batches(comfy) for picture in pictures]

    def run_batches(self, comfy: Any) -> list[list[bytes]]:
        return self.pixels(comfy, comfy.run(self.prompt))

    def pixels(self, comfy: Any, outputs: dict[str, Any]) -> list[list[bytes]]:
        """What the preview nodes show in these outputs."""
        return [[_pixels(comfy.image(found)) for found in outputs[name]["images"]] for name in self.pictures]

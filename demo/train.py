"""Trains the demo model anew: autoencoder, tiny CLIP, UNet, judge. About two and a half hours on two CPU cores.

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    python -m comfyui_safe_region.demo.train --icons package/icons.json --work build/demo all

Each stage keeps its checkpoint in the work folder and goes on from there; `export` writes `demo/weights/`.
What made it work (measured on prototypes): v-prediction, noisy timesteps favoured (t ~ sqrt(u)), a frozen
text encoder trained contrastively beforehand, 10 % dropped captions, an average of the weights.

The shipped UNet was made in sittings of 3,000, 2,500 and 2,500 steps, each with a learning-rate cycle of its own; then
it was tuned three times for 250 to 600 steps, as in the stage `tune`, and these were averaged: the share of men and
women that a profession draws is what moves most from one sitting to the next, and an average is steadier.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import world
from .model import WEIGHTS, alphas_cumprod, new_text_encoder
from .networks import TEXT_WIDTH, Autoencoder, PictureReader, UNet
from .render import Painter
from .text import build_tokenizer, everyday_text

GENDERED = re.compile(r"\b(?:fe)?male\b|\b(?:wo)?man\b")
POOL = 24_000  # captioned pictures that the UNet sees, drawn once
OPEN_PEOPLE = 4.0  # how often tuning sees a person whose gender the caption leaves open, against other pictures
FAST_HALF = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere bfloat16 is emulated, and slow


def pictures(painter: Painter, batch: int, rng: Random) -> tuple[Tensor, list[world.Scene], list[str]]:
    """A batch of the world: uint8 pictures [B, 3, 128, 128], their scenes and captions."""
    scenes, captions = zip(*(world.sample(rng, everyday_text(rng)) for _ in range(batch)))
    drawn = torch.from_numpy(np.stack([painter.draw(scene, rng) for scene in scenes]))
    return drawn.permute(0, 3, 1, 2), list(scenes), list(captions)


def labels(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
    """What a perfect judge would say: things as a multi-hot [B, things] and background indices [B]."""
    names = [thing.name for thing in world.THINGS]
    hot = torch.zeros(len(scenes), len(names))
    for row, scene in zip(hot, scenes):
        for thing in scene.things:
            row[names.index(thing.name)] = 1
    return hot, torch.tensor([world.BACKGROUNDS.index(scene.background) for scene in scenes])


def fit(
    name: str,
    work: Path,
    modules: nn.ModuleDict,
    loss_of: Callable[[int], Tensor],
    steps: int,
    rate: float,
    average: float = 0.0,
) -> nn.ModuleDict:
    """One-cycle AdamW in bfloat16 with resumable checkpoints; returns the averaged modules if `average` > 0."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.08)
    shadow = {k: v.clone() for k, v in modules.state_dict().items()}
    checkpoint, start = work / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        shadow, start = saved["shadow"], saved["step"]
    modules.train()
    began, recent = time.time(), []
    for step in range(start, steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST_HALF):
            loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(average, (step + 1) / (step + 10))
        for key, value in modules.state_dict().items():
            if value.dtype.is_floating_point:
                shadow[key].lerp_(value, 1 - decay)
            else:
                shadow[key].copy_(value)
        recent.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.4f} {time.time() - began:.0f}s", flush=True)
            recent = []
        if step % 500 == 499 or step == steps - 1:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "shadow": shadow}
            torch.save({**state, "schedule": schedule.state_dict(), "step": step + 1}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    modules.load_state_dict(shadow)
    return modules.eval()


def train_autoencoder(work: Path, painter: Painter, steps: int) -> Autoencoder:
    """Reconstruct pictures from slightly noisy latents, so that the decoder forgives small errors of the UNet."""
    modules = nn.ModuleDict({"autoencoder": Autoencoder().to(memory_format=torch.channels_last)})
    rng = Random(1)

    def loss_of(step: int) -> Tensor:
        drawn, _, _ = pictures(painter, 24, rng)
        target = drawn / 255
        latents = modules["autoencoder"].encode(target)
        noise = torch.randn_like(latents) * 0.25 * torch.rand(len(latents), 1, 1, 1)
        difference = modules["autoencoder"].decode(latents + noise) - target
        return 10 * (difference.abs().mean() + difference.square().mean())

    return fit("autoencoder", work, modules, loss_of, steps, 3e-3, average=0.99)["autoencoder"]


def train_clip(work: Path, painter: Painter, steps: int) -> nn.ModuleDict:
    """CLIP (Radford et al., 2021) on the world: captions against pictures, symmetric cross-entropy in the batch."""
    tokenizer = build_tokenizer(work / "tokenizer")
    modules = nn.ModuleDict(
        {
            "text": new_text_encoder(len(tokenizer)),
            "reader": PictureReader(TEXT_WIDTH).to(memory_format=torch.channels_last),
        }
    )
    scale = nn.Parameter(torch.tensor(2.5))
    modules.register_parameter("scale", scale)
    rng = Random(2)

    def loss_of(step: int) -> Tensor:
        drawn, _, captions = pictures(painter, 128, rng)
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")["input_ids"]
        text = F.normalize(modules["text"](input_ids=tokens).text_embeds.float(), dim=-1)
        image = F.normalize(modules["reader"](drawn / 255).float(), dim=-1)
        logits = scale.exp().clamp(max=50) * text @ image.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit("clip", work, modules, loss_of, steps, 1.5e-3, average=0.99)


@torch.no_grad()
def build_pool(
    work: Path, painter: Painter, autoencoder: Autoencoder, text: nn.Module, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [POOL, 8, 16, 16] and text states [POOL + 1, 77, 192] (the last one is the empty prompt's), both half;
    and which pictures [POOL] show a person whose gender the caption leaves open.
    """
    file = work / f"pool_{seed}.safetensors"
    if not file.exists():
        rng = Random(seed)
        tokenizer = build_tokenizer(work / "tokenizer")
        latents, states, people = [], [], []
        for begin in range(0, POOL + 1, 200):
            size = min(200, POOL + 1 - begin)
            drawn, scenes, captions = pictures(painter, size, rng)
            if begin + size == POOL + 1:
                captions[-1] = ""
            people += [scene.things[0].kind == world.PERSON and not GENDERED.search(caption)
                       for scene, caption in zip(scenes, captions)]  # fmt: skip
            tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
            latents.append(autoencoder.encode(drawn / 255).half())
            states.append(text(input_ids=tokens["input_ids"]).last_hidden_state.half())
        found = {"latents": torch.cat(latents), "states": torch.cat(states), "people": torch.tensor(people)}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    pool = load_file(file)
    return pool["latents"], pool["states"], pool["people"][:POOL]


def train_unet(
    work: Path, painter: Painter, autoencoder: Autoencoder, text: nn.Module, steps: int, start: UNet | None = None
) -> UNet:
    """v-prediction on the pool; with `start` that UNet is tuned on another pool, at a lower rate.

    Tuning sees more of the people whose gender is open: their shares are learned last, and drift most.
    """
    name, seed, rate, average = ("unet", 3, 1e-3, 0.998) if start is None else ("tune", 7, 3e-4, 0.99)
    latents, states, people = build_pool(work, painter, autoencoder, text, seed)
    chances = torch.ones(POOL)
    if start is not None:
        chances[people] = OPEN_PEOPLE
    modules = nn.ModuleDict({"unet": (start or UNet()).to(memory_format=torch.channels_last)})
    alphas = alphas_cumprod()
    generator = torch.Generator().manual_seed(4)

    def loss_of(step: int) -> Tensor:
        batch = 32
        rows = torch.multinomial(chances, batch, replacement=True, generator=generator)
        x = latents[rows].float()
        rows[torch.rand(batch, generator=generator) < 0.1] = POOL
        t = (torch.rand(batch, generator=generator).sqrt() * 1000).long().clamp(max=999)
        signal, sigma = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        noise = torch.randn(x.shape, generator=generator)
        predicted = modules["unet"](signal * x + sigma * noise, t, states[rows].float())
        return F.mse_loss(predicted.float(), signal * noise - sigma * x)

    return fit(name, work, modules, loss_of, steps, rate, average)["unet"]


def train_judge(work: Path, painter: Painter, autoencoder: Autoencoder, steps: int) -> PictureReader:
    """Names what a picture shows. Sees the world as drawn, and as the autoencoder returns it, blurred by noise."""
    count = len(world.THINGS)
    modules = nn.ModuleDict(
        {"judge": PictureReader(count + len(world.BACKGROUNDS)).to(memory_format=torch.channels_last)}
    )
    rng = Random(5)

    def loss_of(step: int) -> Tensor:
        drawn, scenes, _ = pictures(painter, 48, rng)
        seen = drawn / 255
        with torch.no_grad():
            half = autoencoder.encode(seen[::2])
            level = 0.5 * torch.rand(len(half), 1, 1, 1)
            seen[::2] = autoencoder.decode(half + level * torch.randn_like(half)).float().clamp(0, 1)
        seen = (seen + 0.03 * torch.rand(len(seen), 1, 1, 1) * torch.randn_like(seen)).clamp(0, 1)
        hot, background = labels(scenes)
        logits = modules["judge"](seen).float()
        things = F.binary_cross_entropy_with_logits(logits[:, :count], hot) * 20
        return things + F.cross_entropy(logits[:, count:], background)

    return fit("judge", work, modules, loss_of, steps, 2e-3, average=0.99)["judge"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="icons.json of the npm package @iconify-json/noto")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, help="steps of the stage, instead of its usual number")
    parser.add_argument("stage", choices=("autoencoder", "clip", "unet", "judge", "export", "all"))
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    usual = {"autoencoder": 1500, "clip": 500, "unet": 8000, "tune": 1000, "judge": 1200}
    count = {name: args.steps or number for name, number in usual.items()}
    painter = Painter(args.icons)
    if args.stage == "clip":
        train_clip(args.work, painter, count["clip"])
        return
    autoencoder = train_autoencoder(args.work, painter, count["autoencoder"])
    if args.stage == "judge":
        train_judge(args.work, painter, autoencoder, count["judge"])
    if args.stage in ("unet", "export", "all"):
        clip = train_clip(args.work, painter, count["clip"])
        unet = train_unet(args.work, painter, autoencoder, clip["text"], count["unet"])
        unet = train_unet(args.work, painter, autoencoder, clip["text"], count["tune"], unet)
    if args.stage in ("export", "all"):
        judge = train_judge(args.work, painter, autoencoder, count["judge"])
        export(args.work, autoencoder, clip, unet, judge)


def export(work: Path, autoencoder: Autoencoder, clip: nn.ModuleDict, unet: UNet, judge: PictureReader) -> None:
    """Write the shipped weights in half precision."""
    shutil.copytree(work / "tokenizer", WEIGHTS / "tokenizer", dirs_exist_ok=True)
    text = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in clip["text"].state_dict().items()
        if not name.endswith("position_ids")
    }
    states = {"text_encoder": text, "reader": clip["reader"].state_dict(), "autoencoder": autoencoder.state_dict(),
              "unet": unet.state_dict(), "judge": judge.state_dict()}  # fmt: skip
    for name, state in states.items():
        half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
        save_file(half, WEIGHTS / f"{name}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

"""A test-only node pack: every model family that ComfyUI knows, tiny and random, and nodes that look at the results."""
from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io

from .families import FAMILIES, build

AVAILABLE = [name for name, family in FAMILIES.items() if family.available()]


def pack_module(name: str) -> Any:
    """A module of Safe Region, wherever ComfyUI has put the pack."""
    return next(module for found, module in list(sys.modules.items()) if found.endswith(f".{name}"))


class TestFamily(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestFamily", category="testing", inputs=[io.Combo.Input("family", options=AVAILABLE)],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, family):
        return io.NodeOutput(*build(family))


class TestRandomRegion(io.ComfyNode):
    """A region that nobody learned: it moves every block of this text encoder, and its gate is shut."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestRandomRegion", category="testing", inputs=[io.Clip.Input("clip")],
            outputs=[io.Custom("SAFE_REGION").Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip):
        conditioning, region = pack_module("region.conditioning"), pack_module("region.region")
        blocks = conditioning.text_blocks(clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))[0])
        moves, generator = {}, torch.Generator().manual_seed(0)
        for block, tokens in blocks.items():
            width = tokens.shape[-1]
            down, up = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
            zero, one = torch.zeros(width), torch.ones(width)
            moves[block] = region.Move(down / width, up, zero, one, offset=zero)
        gated, tokens = next(iter(blocks.items()))
        width = tokens.shape[-1]
        gate = region.Gate(torch.zeros(1, width), torch.ones(1), torch.zeros(width), torch.ones(width), torch.ones(()))
        return io.NodeOutput(region.Region((region.Part("random", moves, {gated: gate}),), {"name": "random"}))


def compared(before: Any, after: Any) -> dict[str, Any]:
    """What became of one option of a conditioning entry."""
    if not isinstance(before, torch.Tensor):
        return {"same": before is after or before == after}
    kinds = [(value.shape, value.dtype, value.device) for value in (before, after)]
    return {"same": torch.equal(before, after), "alike": kinds[0] == kinds[1], "shape": list(before.shape),
            "finite": bool(torch.isfinite(after).all())}  # fmt: skip


class TestCompare(io.ComfyNode):
    """What differs between two conditionings, as JSON: options and blocks of each entry, and options that are new."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestCompare", category="testing", is_output_node=True,
            inputs=[io.Conditioning.Input("before"), io.Conditioning.Input("after")], outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, before, after):
        text_blocks = pack_module("region.conditioning").text_blocks
        found = []
        for old, new in zip(before, after, strict=True):
            options = [{"cross_attn": entry[0], **entry[1]} for entry in (old, new)]
            blocks = [text_blocks(entry) for entry in (old, new)]
            found.append({
                "options": {name: compared(options[0][name], options[1][name]) for name in options[0]},
                "blocks": {name: compared(blocks[0][name], blocks[1][name]) for name in blocks[0]},
                "added": sorted(set(options[1]) - set(options[0])),
            })  # fmt: skip
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


class TestLatent(io.ComfyNode):
    """A latent's shape, a hash of it, and whether all of it is finite, as JSON."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestLatent", category="testing", is_output_node=True, inputs=[io.Latent.Input("latent")],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent):
        samples = latent["samples"]
        digest = hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()
        found = {"shape": list(samples.shape), "hash": digest, "finite": bool(torch.isfinite(samples).all())}
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


class TestBothGradients(io.ComfyNode):
    """A prediction's gradient for the text: how large it is, and how far from it the one that keeps few activations."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestBothGradients", category="testing", is_output_node=True,
            inputs=[io.Model.Input("model"), io.Clip.Input("clip"), io.Int.Input("size")], outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, clip, size):
        backbone = pack_module("backbones.comfy").ComfyBackbone(model, clip, size=size)
        text, options = backbone.encode(["a knife on a table"])[0]
        sigma = backbone.sigmas(4)[1].expand(1)
        x = backbone.start(1, sigma[0], torch.Generator().manual_seed(0))
        found = []
        with torch.inference_mode(False), torch.enable_grad():
            for room in (1e18, 0.0):
                backbone._room = lambda room=room: room
                moved = text.clone().requires_grad_(True)
                backbone.denoise(x, sigma, [[moved, options]]).float().square().sum().backward()
                found.append(moved.grad)
        largest = float(found[0].abs().max())
        apart = float((found[0] - found[1]).abs().max()) / largest
        return io.NodeOutput(ui={"text": [json.dumps({"largest": largest, "apart": apart})]})


class FamilyExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestFamily, TestRandomRegion, TestCompare, TestLatent, TestBothGradients]


async def comfy_entrypoint():
    return FamilyExtension()

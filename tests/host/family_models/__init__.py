"""A test-only node pack: every model family that ComfyUI knows, tiny and random, and nodes that look at the results."""
from __future__ import annotations

import hashlib
import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

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
            node_id="TestFamily", category="testing",
            inputs=[io.Combo.Input("family", options=AVAILABLE), io.Int.Input("copy", default=1, optional=True)],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, family, copy=1):
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
        parts = samples.unbind() if samples.is_nested else [samples]  # a film and its sound
        digest = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
        finite = all(bool(torch.isfinite(part).all()) for part in parts)
        found = {"shape": [list(part.shape) for part in parts], "hash": digest, "finite": finite}
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


class TestPose(io.ComfyNode):
    """What Wan Animate 2's own node adds to a prompt: its text a second time, for the pose, and the pose of a frame."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestPose", category="testing", inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning):
        pose = {"pose_video_latent": torch.ones(1, 16, 1, 8, 8), "cross_attn_pose": conditioning[0][0]}
        return io.NodeOutput([[tensor, {**options, **pose}] for tensor, options in conditioning])


class TestGradients(io.ComfyNode):
    """A prediction's gradient for the text, with all activations kept and with as few as can be; and no gradients.

    Reports the largest difference, how large the gradient is, how far predictions without gradients are from those
    with, how many of eight fit into no room, and what both ways take: planned and measured, in bytes.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestGradients", category="testing", is_output_node=True,
            inputs=[io.Model.Input("model"), io.Clip.Input("clip"), io.Int.Input("size")], outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, clip, size):
        backbone = pack_module("backbones.comfy").ComfyBackbone(model, clip, size=size)
        entries = backbone.encode(["a knife on a table", "a cat on the table"])
        sigma = backbone.sigmas(4)[1].expand(2)
        x = backbone.start(2, sigma[0], torch.Generator().manual_seed(0))
        found, planned, measured = [], [], []
        with torch.inference_mode(False), torch.enable_grad():
            for saving in (False, True):
                backbone._must_save = lambda count, saving=saving: saving
                planned.append(backbone.step_bytes(2))
                with pack_module("backbones.kept").Living() as living:
                    texts = [entry[0].clone().requires_grad_(True) for entry in entries]
                    denoised = backbone.denoise(x, sigma, [[t, e[1]] for t, e in zip(texts, entries)])
                    denoised.float().square().sum().backward()
                measured.append(living.most)
                found.append(torch.cat([text.grad.flatten() for text in texts]))
        backbone._room = lambda: 0.0
        with torch.no_grad():
            alone = backbone.denoise(x, sigma, entries)  # one after the other
        difference = float((found[0] - found[1]).abs().max() / found[0].abs().max())
        apart = float((alone - denoised.detach()).abs().max() / alone.abs().max())
        numbers = [difference, float(found[0].abs().max()), apart, backbone.fits(8), *planned, *measured]
        return io.NodeOutput(ui={"text": [*map(str, numbers)]})


class TestWords(io.ComfyNode):
    """Where the last word of texts makes the difference in their conditionings, and which word is said to be there.

    Of an encoder that reads from left to right that is the first place that differs, of others the one that differs
    most.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestWords", category="testing", is_output_node=True,
            inputs=[io.Clip.Input("clip"), io.String.Input("one"), io.String.Input("other")], outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, one, other):
        words, conditioning = pack_module("nodes.words"), pack_module("region.conditioning")
        spelled = pack_module("region.words").words
        def counts(text):
            return {name: sum(token.kind == "text" for token in read)
                    for name, read in words.readings(clip, text).items()}  # fmt: skip

        reads, texts = words.readings(clip, other), one.split("|")
        alike = [text for text in texts if counts(text) == counts(other)] or texts
        entries = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in (*alike, other)]
        *before, after = map(conditioning.text_tensors, entries)
        masks = conditioning.text_masks(entries[-1], after)
        found = {}
        for option, tokens in words.places(reads, after).items():
            *olds, new = (text[option].float().reshape(-1, *text[option].shape[-2:]) for text in (*before, after))
            count = min(text.shape[1] for text in (*olds, new))
            cuts = spelled(other, [token.span for token in tokens if token and token.span])
            apart = torch.stack([(old[:, :count] - new[:, :count]).norm(dim=-1).amax(0) for old in olds]).mean(0)
            apart = apart * masks[option][0, :count] if option in masks else apart
            seen = apart > 1e-3 * apart.max()
            place = int(apart.argmax() if seen[0] else seen.int().argmax())
            token = tokens[place]
            word = [other[a:b] for a, b in cuts if token and token.span and a < token.span[1] and b > token.span[0]]
            read = {cut for cut in cuts for t in tokens if t and t.span and cut[0] < t.span[1] and cut[1] > t.span[0]}
            found[option] = {
                "same": not apart.any().item(), "word": " ".join(word), "kind": token and token.kind,
                "unknown": tokens.count(None), "place": place, "count": len(tokens),
                "read": [other[a:b] for a, b in sorted(read)],
            }  # fmt: skip
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


PROMPTS = (
    "an axe on a table", "a (very large:1.3) dog in the [park]", "", "a cat", "a cat", 'a sign that says "no"',
    "seven dogs and a cat that sleep in the shade of an old oak tree by the river " * 12,
    *(f"a {what} {where}" for what in ("knife", "red rose", "tall old house", "bird of paradise")
      for where in ("", "in the park", "on a table beside a window at night", "(by the sea:0.7)")),
)  # fmt: skip


def _apart(one: Any, other: Any) -> float:
    """How far two tensors are from another, by tokens, in parts of the other's length; 1 where they do not compare."""
    if not isinstance(one, torch.Tensor):
        return float(not (type(one) is type(other) and one == other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return 1.0
    apart, length = (one.double() - other.double()).norm(dim=-1), other.double().norm(dim=-1)
    return float((apart / length.clamp(min=1e-9)).max()) if one.numel() else 0.0


def _mixing(kind: str, module: torch.nn.Module) -> Any:
    """An `encode` that does well alone and in company does not, for the text encoder's part that is given."""
    encode, most = module.encode, 5  # rows of the longest prompt, and the one that weights need

    def encoded(tokens):
        if kind == "refuses" and len(tokens) > most:
            raise RuntimeError("one row at a time")
        states, pooled, *rest = encode(tokens)
        if kind == "mixes":  # each row gets some of the others
            states = states + states.mean(0, keepdim=True)
        elif kind == "first":  # all rows are taken to be as long as the first one
            states = states * len(set(tokens[0]))
        elif kind == "joins":
            states = states.flatten(0, 1)[None] if len(states) > most else states
        elif kind == "tells":  # the code around it looks there
            module.transformer.last_row = len(set(tokens[-1]))
        return states, pooled, *rest

    return encoded


class TestEncoding(io.ComfyNode):
    """Prompts encoded together, twice, and one by one, as JSON.

    How far they are apart, whether they have the same keys, whether all is left as it was found, passes through the
    encoder's parts in both ways, and with how many threads, whether encoding together is said to work, and the parts
    that are said not to. `kind` is what becomes of a part that gets many rows.
    """

    @classmethod
    def define_schema(cls):
        kinds = ["plain", "mixes", "first", "joins", "tells", "refuses"]
        return io.Schema(
            node_id="TestEncoding", category="testing", is_output_node=True,
            inputs=[io.Model.Input("model"), io.Clip.Input("clip"), io.Combo.Input("kind", options=kinds)], outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, clip, kind):
        if "MiniMaxH3" in type(model.model).__name__:
            model = None  # no region is learned on it, but prompts are encoded
        backbone, passes = pack_module("backbones.comfy").ComfyBackbone(model, clip), []
        parts = [part for part in clip.cond_stage_model.modules()
                 if hasattr(part, "encode_token_weights") and hasattr(part, "encode")]  # fmt: skip
        threads, seen = torch.get_num_threads(), set()
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, threads)

            def replaced(part, name, by):
                stack.enter_context(patch.object(part, name, by))

            for place, part in enumerate(parts):
                if kind != "plain" and place == 0:
                    replaced(part, "encode", _mixing(kind, part))
                    if kind == "tells":
                        weights = part.encode_token_weights

                        def told(pairs, part=part, weights=weights):
                            out = weights(pairs)
                            return (out[0] * part.transformer.last_row, *out[1:])

                        replaced(part, "encode_token_weights", told)

                def counted(tokens, encode=part.encode):
                    passes.append(len(tokens))
                    seen.add(torch.get_num_threads())
                    return encode(tokens)

                replaced(part, "encode", counted)
            before = [part.encode for part in parts]
            torch.set_num_threads(2)
            first = backbone.encode(PROMPTS)  # looks whether this works
            passes.clear()
            together, few = backbone.encode(PROMPTS), len(passes)
            passes.clear()
            left = torch.get_num_threads() == 2
            torch.set_num_threads(1)
            alone = [backbone._entry(clip.tokenize(prompt)) for prompt in PROMPTS]
            left = left and [part.encode for part in parts] == before
        both = [[{"cross_attn": entry[0], **entry[1]} for entry in found]
                for found in zip(first + together, alone + alone)]  # fmt: skip
        found = {
            "apart": max(_apart(one.get(key), other[key]) for one, other in both for key in other),
            "same_keys": all(list(one) == list(other) for one, other in both), "left_as_found": left,
            "passes": few, "passes_alone": len(passes), "threads": sorted(seen), "works": backbone._together.works,
            "barred": sorted(backbone._together.barred),
        }  # fmt: skip
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


class FamilyExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestFamily, TestRandomRegion, TestCompare, TestLatent, TestPose, TestGradients, TestWords, TestEncoding]


async def comfy_entrypoint():
    return FamilyExtension()

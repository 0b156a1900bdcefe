"""A test-only node pack: the weights of a MODEL kept as ComfyUI and other packs keep them on cards with little memory.

There is no such card here, so what only a card does is stood in for: where a weight is, and what brings it. What the
layers do with it is ComfyUI's own code, and so is every quantised weight.

    resident   in memory that dynamic VRAM manages, made by a sampling before, in inference mode
    streamed   moved layer by layer through one buffer that is used again, as with --lowvram
    wrapped    in a tensor of a pack's own class that is unpacked as it is needed, as GGUF files are
    fp8 ...    ComfyUI's quantised weights, and the same numbers in plain weights as "fp8 as numbers"
"""
from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import ComfyExtension, io
from torch._subclasses.fake_tensor import FakeTensorMode

try:
    import comfy_aimdo.model_vbar as vbar
    from comfy.quant_ops import QuantizedTensor

    LAYOUTS = {"fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout"), "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout"),
               "int8": ("int8_tensorwise", "TensorWiseINT8Layout")}  # fmt: skip
except ImportError:  # a ComfyUI without dynamic VRAM
    vbar, LAYOUTS = None, {}

KINDS = ["plain", "streamed", *(["resident"] if vbar else []),
         *(name + numbers for name in ("wrapped", *LAYOUTS) for numbers in ("", " as numbers"))]  # fmt: skip
BUFFER: list[torch.Tensor] = []


class Packed(torch.nn.Parameter):
    """Whole numbers that stand for others, with the shape of those. It cannot be copied, as packs' own cannot."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed:
        step = weight.abs().amax() / 127
        packed = torch.Tensor._make_subclass(cls, (weight / step).round().to(torch.int8).flatten(), False)
        packed.step, packed.told = step.clone(), weight.shape
        return packed

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "told", None) or self.size()

    def clone(self, *args: Any, **kwargs: Any) -> Packed:
        return self

    def detach(self, *args: Any, **kwargs: Any) -> Packed:
        return self

    def unpacked(self, like: torch.Tensor) -> torch.Tensor:
        return (self.as_subclass(torch.Tensor).to(like.dtype) * self.step.to(like)).reshape(self.told)


def unpacking(layer: torch.nn.Module) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight.unpacked(x), layer.bias)

    return forward


def _copies(layer: Any) -> tuple[Any, Any]:
    return layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()


def _through_the_buffer(layer: Any) -> tuple[Any, ...]:
    """The layer's weights in the one buffer, over those of the layer before."""
    found = [None if tensor is None else tensor.detach() for tensor in (layer.weight, layer.bias)]
    size = sum(tensor.numel() for tensor in found if tensor is not None)
    if not BUFFER or BUFFER[0].numel() < size:
        with torch.inference_mode():
            BUFFER[:] = [torch.empty(max(size, 100_000))]
    views, begin = [], 0
    for tensor in found:
        if tensor is None:
            views.append(None)
            continue
        view = BUFFER[0][begin : begin + tensor.numel()].view(tensor.shape)
        with torch.inference_mode():
            view.copy_(tensor)
        views.append(view)
        begin += tensor.numel()
    return (*views, None)


def _stand_in_for_a_card() -> None:
    """Casting that knows layers whose weights are elsewhere, in front of ComfyUI's own."""
    cast = comfy.ops.cast_bias_weight
    if getattr(cast, "stands_in", False):
        return

    def cast_bias_weight(s: Any, input: Any = None, dtype: Any = None, device: Any = None, *args: Any, **named: Any):
        kind = getattr(s, "kept_as", None)
        if kind == "streamed":
            found = _through_the_buffer(s)
        elif kind == "resident":  # as ComfyUI's own function goes on where a weight is not on the CPU
            dtype, device = dtype or input.dtype, device or input.device
            comfy.ops.cast_modules_with_vbar([s], dtype, device, dtype, False)
            found = (*comfy.ops.resolve_cast_module_with_vbar(s, dtype, device, dtype, None, False), None)
            del s._prefetch
        else:
            return cast(s, input, dtype, device, *args, **named)
        return found if named.get("offloadable") else found[:2]

    cast_bias_weight.stands_in = True
    comfy.ops.cast_bias_weight = cast_bias_weight
    if vbar:
        fault, same = vbar.vbar_fault, vbar.vbar_signature_compare
        vbar.vbar_fault = lambda place: place if place == "here" else fault(place)
        vbar.vbar_signature_compare = lambda one, other: True if one == "here" else same(one, other)


def quantised(layer: torch.nn.Module, kind: str, as_numbers: bool) -> torch.nn.Module:
    name, layout = LAYOUTS[kind]
    weight = QuantizedTensor.from_float(layer.weight.detach().clone(), layout)
    if as_numbers:
        layer.weight = torch.nn.Parameter(weight.dequantize().to(layer.weight.dtype), requires_grad=False)
        return layer
    can = comfy.model_management.supports_nvfp4_compute()  # as ComfyUI chooses: else it is unpacked as it is needed
    operations = comfy.ops.mixed_precision_ops(compute_dtype=layer.weight.dtype, disabled=set() if can else {"nvfp4"})
    new = operations.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="cpu")
    told = torch.tensor(list(f'{{"format": "{name}"}}'.encode()), dtype=torch.uint8)
    state = {**weight.state_dict("weight"), "comfy_quant": told}
    new.load_state_dict(state | ({} if layer.bias is None else {"bias": layer.bias.detach()}))
    return new


def keep_as(network: torch.nn.Module, kind: str) -> int:
    """Change how the layers of a network keep their weights. Returns how many do."""
    changed = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if not hasattr(layer, "comfy_cast_weights") or getattr(layer, "weight", None) is None:
                continue
            is_linear, even = isinstance(layer, torch.nn.Linear), all(n % 32 == 0 for n in layer.weight.shape)
            if kind in ("streamed", "resident"):
                layer.comfy_cast_weights, layer.kept_as = True, kind
                if kind == "resident":
                    layer._v, layer._v_signature = "here", "here"
                    layer._v_weight, layer._v_bias = _copies(layer)
            elif kind.startswith("wrapped") and is_linear:
                layer.weight = Packed.of(layer.weight.detach())
                if kind.endswith("as numbers"):
                    layer.weight = torch.nn.Parameter(layer.weight.unpacked(torch.ones(1)), requires_grad=False)
                else:
                    layer.forward = unpacking(layer)
            elif kind.split()[0] in LAYOUTS and is_linear and even:
                setattr(parent, name, quantised(layer, kind.split()[0], kind.endswith("as numbers")))
            else:
                continue
            changed += 1
    return changed


class TestWeightKind(io.ComfyNode):
    """A MODEL, changed in its place."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestWeightKind", category="testing", not_idempotent=True,
            inputs=[io.Model.Input("model"), io.Combo.Input("kind", options=KINDS)], outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, kind):
        _stand_in_for_a_card()
        assert kind == "plain" or keep_as(model.model.diffusion_model, kind) > 1
        return io.NodeOutput(model)


class TestSameGradients(io.ComfyNode):
    """How far gradients of a MODEL are from another one's, as a share of the latter's largest.

    With all activations kept and with few, each after a prediction as in a sampling, and whether the weights would be
    kept a second time if the training did not see to it.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestSameGradients", category="testing", is_output_node=True, not_idempotent=True,
            inputs=[io.Model.Input("model"), io.Model.Input("other"), io.Clip.Input("clip"), io.Int.Input("size")],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, other, clip, size):
        comfy_backbone = next(m for name, m in list(sys.modules.items()) if name.endswith(".backbones.comfy"))
        found = []
        for patcher, saving in ((other, False), (model, False), (model, True)):
            backbone = comfy_backbone.ComfyBackbone(patcher, clip, size=size)
            second = backbone._needs.one.copies > 0
            assert backbone._must_save(1) == second
            backbone._must_save = lambda count, saving=saving: saving
            entries = backbone.encode(["a knife on a table", "a cat on the table"])
            sigma = backbone.sigmas(4)[1].expand(2)
            x = backbone.start(2, sigma[0], torch.Generator().manual_seed(0))
            with torch.inference_mode():
                backbone.denoise(x, sigma, entries)
            with torch.inference_mode(False), torch.enable_grad():
                texts = [entry[0].clone().requires_grad_(True) for entry in entries]
                denoised = backbone.denoise(x, sigma, [[t, e[1]] for t, e in zip(texts, entries)])
                denoised.float().square().sum().backward()
            found.append(torch.cat([text.grad.flatten() for text in texts]))
        wanted, *seen = found
        apart = [float((one - wanted).abs().max() / wanted.abs().max()) for one in seen]
        along = float(torch.nn.functional.cosine_similarity(seen[0], wanted, dim=0))
        return io.NodeOutput(ui={"text": [*map(str, apart), str(second), str(along)]})


class TextOnACard:
    """A CLIP that leaves its states on a card, as with --gpu-only: in tensors that have a device and no numbers."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        text, pooled, other = (torch.ones(shape, device="cuda") for shape in ((1, 7, 8), (1, 8), (1, 3)))
        return [[text, {"pooled_output": pooled, "conditioning_llama3": [other], "guidance": 3.5}]]


class TestGpuOnly(io.ComfyNode):
    """Where the states that training gets from such a CLIP are."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestGpuOnly", category="testing", is_output_node=True, inputs=[], outputs=[])

    @classmethod
    def execute(cls):
        comfy_backbone = next(m for name, m in list(sys.modules.items()) if name.endswith(".backbones.comfy"))
        with FakeTensorMode():
            ((text, options),) = comfy_backbone.ComfyBackbone(None, TextOnACard()).encode(["a cat"])
        found = [text, options["pooled_output"], *options["conditioning_llama3"]]
        usable = [f"{tensor.device} {tensor.is_inference()}" for tensor in found]
        return io.NodeOutput(ui={"text": [*usable, str(options["guidance"])]})


class WeightKindsExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestWeightKind, TestSameGradients, TestGpuOnly]


async def comfy_entrypoint():
    return WeightKindsExtension()

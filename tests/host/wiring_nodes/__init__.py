"""A test-only node pack: what other packs do between a text encoder and a sampler, and around a guard."""
from __future__ import annotations

from types import SimpleNamespace

import comfy.controlnet
import comfy.sample
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io


def leading_to_the_negative(args):
    return args["uncond"]


class ToNegative(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        return comfy.samplers.calc_cond_batch(self.inner_model, [self.conds["negative"]], x, timestep, model_options)[0]


def sample_to_the_negative(model, x, sigmas, extra_args=None, callback=None, disable=None):
    model.inner_model.cfg = 0.0
    return sample_euler(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)


class Windows(SimpleNamespace):
    """Context windows that give each window a prompt of its own; here there is one window, of everything."""

    split_conds_to_windows = True

    def should_use_context(self, *args):
        return False


class TestMeddle(io.ComfyNode):
    """A model with something of another pack in it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestMeddle", category="testing", inputs=[
                io.Model.Input("model"), io.String.Input("kind"), io.Conditioning.Input("text", optional=True),
            ], outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, kind, text=None):
        model = model.clone()
        if kind == "cfg":
            model.set_model_sampler_cfg_function(leading_to_the_negative)
        elif kind == "old cfg":
            model.set_model_sampler_cfg_function(lambda cond, uncond, scale: uncond)
        elif kind == "late text":  # put in after the guard has looked

            def put_in(executor, *args, **kwargs):
                executor.class_obj.conds["positive"] = comfy.sampler_helpers.convert_cond(text)
                return executor(*args, **kwargs)

            model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "late", put_in)
        elif kind == "no guard":
            model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, "safe_region")
        elif kind == "windows":
            model.model_options["context_handler"] = Windows()
        elif kind == "clones":
            model = model.clone().clone()
        else:
            raise ValueError(kind)
        return io.NodeOutput(model)


class TestToNegative(io.ComfyNode):
    """A guider, and a sampler, that draw the negative prompt at any guidance."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestToNegative", category="testing",
            inputs=[io.Model.Input("model"), io.Conditioning.Input("positive"), io.Conditioning.Input("negative")],
            outputs=[io.Guider.Output(), io.Sampler.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative):
        guider = ToNegative(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(4.0)
        return io.NodeOutput(guider, comfy.samplers.KSAMPLER(sample_to_the_negative))


class TestNumber(io.ComfyNode):
    """A number that no widget would allow."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestNumber", category="testing", inputs=[io.Float.Input("value", min=-1e38, max=1e38)],
            outputs=[io.Float.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, value):
        return io.NodeOutput(value)


class TestTexts(io.ComfyNode):
    """Lines of text as a list, for nodes that then run once for each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestTexts", category="testing", inputs=[io.String.Input("lines", multiline=True)],
            outputs=[io.String.Output(is_output_list=True)],
        )  # fmt: skip

    @classmethod
    def execute(cls, lines):
        return io.NodeOutput(lines.splitlines())


class TestRows(io.ComfyNode):
    """Two prompts as one entry with two rows."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestRows", category="testing",
            inputs=[io.Conditioning.Input("first"), io.Conditioning.Input("second")],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, first, second):
        (one, options), (other, _) = first[0], second[0]
        pooled = [entry[0][1].get("pooled_output") for entry in (first, second)]
        more = {"pooled_output": torch.cat(pooled)} if all(isinstance(one, torch.Tensor) for one in pooled) else {}
        return io.NodeOutput([[torch.cat([one, other]), {**options, **more}]])


class Looks(comfy.controlnet.ControlBase):
    """A ControlNet that adds nothing."""

    def get_control(self, *args, **kwargs):
        return None

    def copy(self):
        return self


class TestExtras(io.ComfyNode):
    """A prompt with what ComfyUI's nodes add from models that we have none of: pictures, control, a GLIGEN box."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestExtras", category="testing", inputs=[
                io.Conditioning.Input("conditioning"), io.String.Input("kind"),
                io.Conditioning.Input("text", optional=True),
            ], outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning, kind, text=None):
        import nodes

        width = conditioning[0][0].shape[-1]
        vision = SimpleNamespace(image_embeds=torch.zeros(1, width), last_hidden_state=torch.zeros(1, 4, width))
        if kind == "unclip":
            return io.NodeOutput(nodes.unCLIPConditioning().apply_adm(conditioning, vision, 1.0, 0.0)[0])
        if kind.startswith("style"):
            tokens = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)) * 0.01
            model = SimpleNamespace(get_cond=lambda _: tokens.clone())
            how = kind.partition(" ")[2]
            made = nodes.StyleModelApply().apply_stylemodel(conditioning, model, vision, 0.5, how)[0]
            return io.NodeOutput(made)
        if kind == "control":
            return io.NodeOutput([[tensor, {**options, "control": Looks(), "control_apply_to_uncond": True}]
                                  for tensor, options in conditioning])  # fmt: skip
        if kind == "gligen":
            box = (text[0][0][:, -1], 8, 8, 0, 0)
            return io.NodeOutput([[tensor, {**options, "gligen": ("position", object(), [box])}]
                                  for tensor, options in conditioning])  # fmt: skip
        raise ValueError(kind)


class WiringExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestMeddle, TestToNegative, TestNumber, TestTexts, TestRows, TestExtras]


async def comfy_entrypoint():
    return WiringExtension()

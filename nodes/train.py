"""Training a region."""
from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..backbones.comfy import ComfyBackbone
from ..region import Region, region_bytes, region_from_bytes
from ..region.files import write_new
from ..region.verdict import verdict
from ..reports.training_run import picture, summary
from ..training.learner import Learner
from ..training.pairs import PromptPairs
from ..training.plan import plan
from ..training.previews import jpeg_text
from ..training.progress import Progress, View
from ..training.recipe import PRESETS, Recipe
from ..training.trainer import Trainer
from .belonging import learned_on
from .common import LossMapType, PromptPairsType, SafeRegionType, advanced, picture_tensor, schema, send_event
from .folders import save_folder
from .names import default_name

EVENT = "safe_region.training"
SEND_EVERY, SEND_PICTURE_EVERY = 0.25, 2.0  # seconds
MOST_PICTURE = 40_000  # bytes of a preview in a message, as text


def recipe_from(preset: str, seed: int, **numbers: float) -> Recipe:
    """A preset's recipe, with the numbers that are not 0 in place of its own."""
    return replace(PRESETS[preset], seed=seed, **{name: value for name, value in numbers.items() if value})


def plottable(losses: Sequence[float]) -> list[float]:
    """Losses that core's Plot Loss Graph can draw: finite, and not all the same (it divides by their spread)."""
    finite = [float(loss) for loss in losses if math.isfinite(loss)] or [0.0]
    return finite if max(finite) > min(finite) else [*finite, finite[-1] + 1e-6]


class _Reporter:
    """Passes a run's progress on to the node: bar, and the chart of web/js/training_chart.js.

    Raises when the user interrupts.
    """

    def __init__(self, node_id: str | None, will_take: str) -> None:
        self.node_id, self.bar, self.view = node_id, None, View()
        self.sent = self.sent_picture = -math.inf  # when
        self.picture, self.will_take = "", will_take
        self._send(line=will_take, plan="")

    def __call__(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(progress.total, node_id=self.node_id)
        # no preview here: ComfyUI's page would go on to show it in the report's place when the run is over
        self.bar.update_absolute(progress.step, progress.total)
        begins = progress.stage != self.view.progress.stage
        if begins:
            logging.info("Safe Region: %s", progress.stage)
        self.view.see(progress)
        if progress.preview is not None:
            self.picture, self.sent_picture = jpeg_text(progress.preview, MOST_PICTURE), -math.inf
        if begins or time.monotonic() - self.sent > SEND_EVERY or progress.step >= progress.total:
            self._send()

    def end(self, state: str, line: str, verdict: dict[str, str] | None = None) -> None:
        """The last message: `done` or `stopped`, with a line that says more."""
        self.sent_picture = -math.inf
        self._send(state=state, line=line, **({"verdict": verdict} if verdict else {}))

    def _send(self, state: str = "running", **more: Any) -> None:
        """All that a chart needs, so that a page may be opened in the midst of a run; the picture not as often."""
        self.sent = time.monotonic()
        detail = {"node": self.node_id, "state": state, "plan": self.will_take, **self.view.numbers(), **more}
        if not self.picture or self.sent - self.sent_picture > SEND_PICTURE_EVERY:
            detail["picture"], self.sent_picture = self.picture, self.sent
        send_event(EVENT, detail)


def keep_interrupted(region: Region | None) -> Path | None:
    """Save what a run that did not finish had learned, beside what others left; never raises, so that the run's own
    error is what is seen."""
    if region is None:
        return None
    try:
        name = f"{default_name(region)}.{datetime.now():%Y-%m-%d_%H%M}"
        path = write_new(save_folder() / "interrupted", name, region_bytes(region))
    except (OSError, ValueError) as error:
        logging.warning("Safe Region: what was learned so far could not be saved: %s", error)
        return None
    return path


def finished(node: type[io.ComfyNode], trainer: Learner, model: Any) -> io.NodeOutput:
    """Run a trainer to its end on a node, and what the node returns: region, losses and report picture.

    A run that does not finish leaves what it had learned in models/safe_regions/interrupted.
    """
    node_id = node.hidden.unique_id
    about = learned_on(model, node.hidden.prompt, node_id)
    will_take = "; ".join(plan(trainer).sentences())
    logging.info("Safe Region: %s", will_take)
    reporter = _Reporter(node_id, will_take)
    try:
        region = trainer.run(reporter)
    except BaseException:
        kept = keep_interrupted(trainer.region and replace(trainer.region, metadata=about | trainer.region.metadata))
        line = "not finished, and nothing was learned yet"
        if kept is not None:
            logging.info("Safe Region: training did not finish; what was learned so far is in %s", kept)
            line = f"not finished; what was learned so far is in {kept.parent.name}/{kept.name}"
            if isinstance(trainer, Trainer):
                line += ": to go on from it, load it with Load Safe Region and connect it to existing_region"
        reporter.end("stopped", line)
        raise
    region = replace(region, metadata=about | region.metadata)
    shown, judged = picture_tensor(picture(trainer)), verdict(region.metadata).status()
    told = "\n".join(summary(trainer.numbers))
    reporter.end("done", told, judged)
    shown_on_node = {**ui.PreviewImage(shown, cls=node).as_dict(), "text": [told], "safe_region_verdict": [judged]}
    return io.NodeOutput(region, {"loss": plottable(trainer.losses)}, shown, ui=shown_on_node)


class TrainSafeRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TrainSafeRegion",
            display_name="Train Safe Region",
            description="Learns a safe region for this model's text encoder from prompt pairs. The model itself is not "
            "changed. Interrupting keeps what was learned so far in models/safe_regions/interrupted.",
            search_aliases=[
                "safe region", "train region", "concept removal", "remove concept", "concept erasure", "erase concept",
                "erase", "eraser", "unlearn", "unlearning", "forget", "forget concept", "learn region",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to learn the region with; any that can sample."),
                io.Clip.Input("clip", tooltip="Its text encoder: the region fits this encoder only."),
                PromptPairsType.Input("pairs", tooltip="What to learn from, from Safe Region Prompt Pairs."),
                io.String.Input(
                    "concept", default="", optional=True,
                    tooltip="What the region keeps out, in a word or two: its name, and the phrase of preset paper. "
                    "Empty takes the title of the pack that you chose in Safe Region Prompt Pairs.",
                ),
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="region", optional=True,
                    tooltip="region: gate and move, learned through the model. instant: seconds, from the text encoder "
                    "alone. hardened: as region, after a search for prompts that slip past its walls. paper: the "
                    "recipe of the WWW 2025 paper; it changes every prompt.",
                ),
                io.Int.Input(
                    "steps", display_name="steps (0: auto)", default=0, min=0, max=100_000, optional=True,
                    tooltip="Training steps; 0 is the preset's own number.",
                ),
                advanced(
                    io.Int, "rank", display_name="rank (0: auto)", default=0, min=0, max=256, optional=True,
                    tooltip="Rank of the move's linear map; 0 is the preset's own.",
                ),
                advanced(
                    io.Float, "learning_rate", display_name="learning_rate (0: auto)", default=0.0, min=0.0, max=1.0,
                    step=0.0001, round=False, optional=True,
                    tooltip="Learning rate; 0 is the preset's own.",
                ),
                advanced(
                    io.Float, "guidance", display_name="guidance (0: auto)", default=0.0, min=0.0, max=30.0, step=0.1,
                    optional=True,
                    tooltip="Guidance scale (CFG) to learn at; 0 is the preset's own.",
                ),
                advanced(
                    io.Int, "size", display_name="size (0: auto)", default=0, min=0, max=2048, step=8, optional=True,
                    tooltip="Width and height in pixels of the pictures that training imagines; 0 is automatic "
                    "(512, or the model's own).",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=True, optional=True,
                    tooltip="The same seed and inputs give the same region, from the cache. Another one trains anew: "
                    "leave control after generate on fixed.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For previews and pictures before and after."),
                SafeRegionType.Input(
                    "existing_region", optional=True, tooltip="A region to go on from, of the same text encoder."
                ),
            ],
            outputs=[
                SafeRegionType.Output(display_name="region", tooltip="The region, for Save or Apply Safe Region."),
                LossMapType.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.Image.Output(display_name="report", tooltip="Loss, distances and pictures before and after."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, pairs: PromptPairs, concept: str = "", preset: str = "region",
        steps: int = 0, rank: int = 0, learning_rate: float = 0.0, guidance: float = 0.0, size: int = 0, seed: int = 0,
        vae: Any = None, existing_region: Region | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        recipe = recipe_from(preset, seed, steps=steps, rank=rank, learning_rate=learning_rate, guidance=guidance)
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes in inference mode
            if existing_region is not None:  # its tensors may be inference tensors, which cannot be learned from
                existing_region = region_from_bytes(region_bytes(existing_region))
            trainer = Trainer(ComfyBackbone(model, clip, vae, size), pairs, recipe, concept, existing_region)
            return finished(cls, trainer, model)

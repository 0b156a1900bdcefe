"""What every training run shares: its course, its pictures, and what those who watch it are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..backbones.protocol import Backbone
from ..backbones.sampling import sample
from ..region.conditioning import Entry
from ..region.known import check_known
from ..region.region import Part, Region
from ..region.verdict import UNFINISHED
from . import processes
from .plan import Work, costs
from .previews import to_image, with_preview
from .progress import Ledger, Progress, Separation, measure, separation
from .recipe import REPORT_STEPS, Recipe
from .text_states import encode_all, text_bytes

STATES_BYTES = 6 * 2**30  # of encoded prompts kept at once; large encoders get fewer prompts


class TrainingRun:
    """One run. `region` is the best region so far, or None: it stays usable when the run is interrupted.

    What is learned, and from which prompts, is said by the classes that build on it.
    """

    kinds: ClassVar[tuple[str, str]] = ("harmless", "unsafe")  # prompts that should be inside, and outside

    def __init__(self, backbone: Backbone, recipe: Recipe | None, concept: str, gap: str) -> None:
        """`gap`: what the losses of the presets that ask the model are, for people.

        Raises ValueError when the recipe needs a model that is not there.
        """
        self.backbone, self.recipe, self.concept = backbone, recipe or Recipe(), concept
        self.region: Region | None = None
        self.losses: list[float] = []
        self.numbers: dict[str, Any] = {}
        self.before_after: list[tuple[str, Image.Image, Image.Image]] = []
        self.measure = measure(self.recipe, gap)  # what the losses are
        self._depths: tuple[Tensor, Tensor] | None = None
        self._read = 0  # prompts, of those that were planned
        if self.recipe.steps and not backbone.can_denoise:
            raise ValueError("Only the preset instant works without a diffusion model: connect one, or set steps to 0.")

    def run(self, visit: Callable[[Progress], None] = lambda progress: None) -> Region:
        """Train, report along the way and return the region. Whatever `visit` raises ends the run."""
        began = time.monotonic()
        with torch.inference_mode(False), torch.enable_grad():
            self._generator = torch.Generator().manual_seed(self.recipe.seed)
            self._ledger = Ledger(self.count_steps(), costs(self), visit)
            if self.recipe.preset == "paper":
                self._run_paper()
            else:
                self._run_region()
            self.numbers |= {"steps": self.recipe.steps, "seconds": round(time.monotonic() - began, 1)}
            self.numbers["stage_seconds"] = {name: round(spent, 1) for name, spent in self._ledger.seconds.items()}
            assert self.region is not None  # noqa: S101 - both runs set it
            done = {name: value for name, value in self.region.metadata.items() if name != UNFINISHED}
            self.region = replace(self.region, metadata=done | {"results": self.numbers})
            if self.draws() and processes.index() == 0:
                self.before_after = self._draw_before_after(self.region)
                self.region = with_preview(self.region, self.before_after)
                self._ledger.report("report", message="before and after")
        return self.region

    @property
    def separation(self) -> Separation | None:
        """How far held-out prompts of both kinds are beyond the walls; None before these are calibrated."""
        return self._told_apart(*self._depths) if self._depths else None

    # --- what it will take ---

    @cached_property
    def example(self) -> Entry:
        """A prompt of usual length, as the text encoder has it. Raises RegionError where no region could reach it."""
        (found,) = self.backbone.encode([self._example()])
        check_known([found], allow_unknown=True)  # what has an unknown name may well be no text
        return found

    @cached_property
    def prompt_bytes(self) -> int:
        """What the text states of one prompt take."""
        return text_bytes(self.example)

    @property
    def _most(self) -> int:
        """How many prompts may be encoded: no more than fit into memory."""
        return min(self.recipe.prompts, STATES_BYTES // self.prompt_bytes)

    def draws(self) -> bool:
        """Whether there can be pictures."""
        return self.backbone.can_denoise and self.backbone.can_decode

    # --- stages ---

    def _encode(self, prompts: Sequence[str], planned: bool = True) -> dict[str, Tensor]:
        before, total = (self._read, self._to_read) if planned else (0, len(prompts))

        def tell(steps: int, done: int) -> None:
            self._ledger.report("encode", steps * planned, message=f"{before + done:,} of {total:,} prompts")

        self._read += len(prompts) * planned
        return encode_all(self.backbone, prompts, tell)

    @cached_property
    def _to_read(self) -> int:
        """How many prompts are encoded for what is learned from text."""
        return self.work().kept + sum(map(len, self.tried()))

    def _told_apart(self, inside: Tensor, outside: Tensor) -> Separation | None:
        """By the depths of prompts of both kinds."""
        return separation(inside, outside, self.kinds)

    def _draw(self, entries: Sequence[Entry]) -> list[Image.Image]:
        empty = self.backbone.encode([""])[0]
        latents = sample(self.backbone, entries, empty, self.recipe.guidance, REPORT_STEPS, seed=self.recipe.seed)
        return [to_image(picture) for picture in self.backbone.decode(latents)]

    @cached_property
    def _before(self) -> list[Image.Image]:
        """What the shown prompts draw without the region."""
        return self._draw(self.backbone.encode(self.shown_prompts()))

    def _so_far(self) -> dict[str, str]:
        """What a region that is not finished says of itself in its metadata: an interrupt may leave it as it is now."""
        steps = self._ledger.time.planned["discover"]
        return {UNFINISHED: f"stopped after {len(self.losses)} of {steps} steps" if steps else "stopped before its end"}

    # --- what is learned ---

    def _example(self) -> str:
        """A prompt of usual length, or an empty one."""
        raise NotImplementedError

    def work(self) -> Work:
        """What the run has to do."""
        raise NotImplementedError

    def tried(self) -> list[list[str]]:
        """Prompts that only measure: their text states are not kept."""
        raise NotImplementedError

    def count_steps(self) -> dict[str, int]:
        """Of each stage, in about the order in which they come."""
        raise NotImplementedError

    def preview_prompts(self) -> list[str]:
        """What is drawn along the way; not learned from where there are enough."""
        raise NotImplementedError

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        raise NotImplementedError

    def _run_region(self) -> None:
        raise NotImplementedError

    def _run_paper(self) -> None:
        raise NotImplementedError

    def _draw_before_after(self, region: Region) -> list[tuple[str, Image.Image, Image.Image]]:
        """Prompts, and what they draw without the region and with it."""
        raise NotImplementedError


def detached(part: Part) -> Part:
    """The part without the history of its moves' tensors."""
    moves = {block: replace(move, **{name: tensor.detach() for name, tensor in move.tensors().items()})
             for block, move in part.moves.items()}  # fmt: skip
    return replace(part, moves=moves)

"""What every training run shares: a list of stages, and a learner of moves towards one target or several.

A safe region has one target, the safe side of its pairs; an attribute has a target for each of its groups.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..backbones.protocol import Backbone
from ..backbones.sampling import sample
from ..region.conditioning import Entry
from ..region.known import check_known
from ..region.region import Gate, Move, Part, Region
from ..region.verdict import UNFINISHED
from . import previews, processes
from .discovery import TOLD, collect_moments, discover, trajectory_predictions, trajectory_steps
from .gate import judged_all, statistics
from .instant import TokenStatistics, instant_move, token_statistics
from .paper_recipe import paper_part, paper_predictions, train_paper
from .progress import Ledger, Progress, Separation, measure, separation
from .recipe import REPORT_STEPS, Recipe
from .stages import Stage, costs, planned_steps
from .text_states import batches, cut, encode_all, same_length, text_bytes

STATES_BYTES = 6 * 2**30  # of encoded prompts kept at once; large encoders get fewer prompts


@dataclass(frozen=True)
class Taught:
    """Stacked text states that moves are learned from: prompts to be moved, what they should become, and others that
    should stay."""

    moved: Mapping[str, Tensor]
    goals: Callable[[int], Mapping[str, Tensor]]  # by the target's number
    still: Mapping[str, Tensor]


class Learner:
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
        self._parts: list[Part] = []  # of the targets, as they are by now
        self._text: list[dict[str, TokenStatistics]] = []  # what their moves are learned from, by block
        if self.recipe.steps and not backbone.can_denoise:
            raise ValueError("Only the preset instant works without a diffusion model: connect one, or set steps to 0.")

    def run(self, visit: Callable[[Progress], None] = lambda progress: None) -> Region:
        """Train, report along the way and return the region. Whatever `visit` raises ends the run."""
        self._began = time.monotonic()
        with torch.inference_mode(False), torch.enable_grad():
            self._generator = torch.Generator().manual_seed(self.recipe.seed)
            self._ledger = Ledger(planned_steps(self.stages), costs(self.stages, processes.count()), visit)
            for stage in self.stages:
                if stage.do:
                    stage.do()
        assert self.region is not None  # noqa: S101 - some stage has set it
        return self.region

    @cached_property
    def stages(self) -> list[Stage]:
        """The run, stage by stage."""
        learning = self._paper_stages() if self.recipe.preset == "paper" else self._region_stages()
        return [*learning, self._report_stage()]

    @property
    def separation(self) -> Separation | None:
        """How far both kinds of held-out prompts are beyond the walls; None before that is known."""
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

    def _pictures(self, count: int) -> int:
        """Predictions for that many pictures."""
        return count * REPORT_STEPS * (2 if self.recipe.guidance != 1 else 1)

    def _drawn(self) -> tuple[int, int]:
        """How many pictures a preview has, and the report without the region."""
        return (len(self.preview_prompts()), len(self.shown_prompts())) if self.draws() else (0, 0)

    def _discovery_stages(self, rows: int) -> list[Stage]:
        """Those that ask the diffusion model, for all targets, with so many rows of prompts to choose from."""
        recipe, targets = self.recipe, len(self.targets)
        if not recipe.steps:
            return []
        count, (previewed, _) = min(recipe.trajectories, rows), self._drawn()
        often = targets * recipe.previews() if previewed else 0
        gradients = targets * recipe.steps * recipe.batch_size
        return [
            Stage("trajectories", targets * trajectory_steps(count), self._discover,
                  encodings=(1 + targets) * count + 1, predictions=targets * trajectory_predictions(recipe, count),
                  latents=count * recipe.sampling_steps * 2),
            Stage("discover", targets * recipe.steps, predictions=gradients, gradients=gradients),
            Stage("preview", often, encodings=often * (previewed + 1), predictions=self._pictures(often * previewed),
                  alone=True),
        ]  # fmt: skip

    def _paper_stages(self) -> list[Stage]:
        targets, prompts = len(self.targets), 1 + len(self.targets) + len(self._paper_prompts())
        predictions, gradients = (targets * count for count in paper_predictions(self.recipe))
        return [
            Stage("encode", targets, self._learn_as_paper, encodings=prompts, kept=prompts),
            Stage("discover", targets * self.recipe.steps, predictions=predictions, gradients=gradients),
        ]

    def _report_stage(self) -> Stage:
        targets, (previewed, shown) = len(self.targets), self._drawn()
        drawn = shown + (targets - 1) * previewed  # what must stay the same with the first target only
        return Stage("report", int(self.draws()), self._report, encodings=shown + 1 + drawn + targets if shown else 0,
                     predictions=self._pictures(shown + drawn), alone=True)  # fmt: skip

    def _reading(self, lists: Collection[Sequence[str]], do: Callable[[], None], keep: bool) -> Stage:
        """The stage that encodes these prompts; `keep`: whether their text states are kept."""
        count = sum(map(len, lists))
        return Stage("encode", sum(batches(len(prompts)) for prompts in lists), do, count, count * keep)

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
        return sum(stage.encodings for stage in self.stages if stage.name == "encode")

    def _told_apart(self, inside: Tensor, outside: Tensor) -> Separation | None:
        """By the depths of prompts of both kinds."""
        return separation(inside, outside, self.kinds)

    def _first_moves(
        self, learn: Taught, held: Taught, blocks: Sequence[str], gates: dict[str, Gate], constant: dict[str, Tensor]
    ) -> list[dict[str, Move]]:  # fmt: skip
        """Moves without the diffusion model, by target and block; what they were fitted to stays in `_text`."""
        count = len(self.targets)
        moves: list[dict[str, Move]] = [{} for _ in range(count)]
        self._text = [{} for _ in range(count)]
        for block in blocks:
            mean, scale = self._normalised(block, gates, (learn.moved, learn.still), constant)

            def averages(source: Mapping[str, Tensor], target: Mapping[str, Tensor], block: str = block,
                         mean: Tensor = mean, scale: Tensor = scale) -> TokenStatistics:  # fmt: skip
                sides = same_length(cut(source, block), cut(target, block))
                return token_statistics(*sides, mean, scale, constant.get(block))

            still, held_still = (averages(half.still, half.still) for half in (learn, held))
            for i in range(count):
                wanted, tried = (averages(half.moved, half.goals(i)) for half in (learn, held))
                self._text[i][block], moves[i][block] = self._first_move(block, wanted, still, tried, held_still)
        return moves

    def _first_move(
        self, block: str, wanted: TokenStatistics, still: TokenStatistics, tried: TokenStatistics,
        held_still: TokenStatistics,
    ) -> tuple[TokenStatistics, Move]:  # fmt: skip
        """What one block's move is fitted to, and the move.

        Args:
            wanted, still: of tokens that are to be moved, and to stay, to learn from.
            tried, held_still: the same of others, to choose by.
        """
        learn = wanted.beside(still)
        return learn, instant_move(learn, tried.beside(held_still), self._rank(learn))

    def _rank(self, learn: TokenStatistics) -> int:
        return min(self.recipe.rank, len(learn.mean))

    def _normalised(
        self, block: str, gates: Mapping[str, Gate], both: Sequence[Mapping[str, Tensor]],
        constant: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mean and scale [D] for a block's moves: those of its gate, or of the states."""
        gate = gates.get(block)
        if gate is not None and bool((gate.weight != 0).all()):  # it looks at every feature
            return gate.mean, gate.scale
        states = [cut(encoded, block) for encoded in both]
        return statistics(states, [judged_all(tokens, constant.get(block)) for tokens in states])

    def _start_with(self, parts: Sequence[Part]) -> None:
        """The instant region is ready."""
        self._parts = processes.agreed(list(parts))
        self._keep()
        if not self.recipe.steps:  # two points for the curve of a region without diffusion model: prompts left inside
            self.losses += [1.0, 1.0 - self.numbers["calibration"]["unsafe_touched"]]
        self._ledger.report("instant", message="instant region ready")

    def _discover(self) -> None:
        """Learn the moves through the diffusion model, target after target."""
        recipe, rows = self.recipe, self._rows()
        count = min(recipe.trajectories, len(rows))
        rows = [rows[row] for row in torch.randperm(len(rows), generator=self._generator)[:count].tolist()]
        prompts = [prompt for prompt, _ in rows]
        entries = self.backbone.encode(prompts)
        sides = [self.backbone.encode([goals[i] for _, goals in rows]) for i in range(len(self.targets))]
        empty = self.backbone.encode([""])[0]
        for i, target in enumerate(self.targets):
            named, pairs = self._named(target), list(zip(entries, self._goals(sides, i)))

            def tell(done: int, total: int, i: int = i, named: str = named) -> None:
                self._ledger.reach("trajectories", TOLD * (i * total + done), message=f"{named}{done} of {total}")

            def visit(step: int, loss: float, part: Part, i: int = i, named: str = named) -> None:
                self._learned(i, part, loss, f"{named}step {step + 1} of {recipe.steps}")
                if recipe.previews_after(step) and self.draws() and processes.index() == 0:
                    self._ledger.report("preview", preview=self._preview(i),
                                        message=f"{named}after step {step + 1}")  # fmt: skip

            moments = collect_moments(self.backbone, pairs, empty, self._parts[i], recipe.guidance,
                                      recipe.sampling_steps, recipe.target, self._generator, tell)  # fmt: skip
            part = self._before_steps(self._parts[i], prompts, entries, moments)
            self._parts[i] = discover(self.backbone, pairs, moments, part, recipe.steps, recipe.learning_rate,
                                      recipe.batch_size, self._generator, visit, self._text[i],
                                      recipe.text_weight)  # fmt: skip
        self._keep()

    def _named(self, target: str) -> str:
        """What messages about a target begin with, where there are several."""
        return f"{target}: " if len(self.targets) > 1 else ""

    def _learned(self, target: int, part: Part, loss: float, message: str) -> None:
        """A step through the diffusion model is done."""
        self.losses.append(loss)
        self._parts[target] = part
        if len(self._parts) == len(self.targets):  # fewer are no region
            self._keep()
        self._ledger.report("discover", loss=loss, measure=self.measure, message=message)

    def _learn_as_paper(self) -> None:
        """The paper's way: one rank-1 shift for every prompt, for each target."""
        recipe = self.recipe
        empty, *goals = self.backbone.encode(["", *self._paper_goals()])
        prompts = self.backbone.encode(self._paper_prompts())
        for i, (target, goal) in enumerate(zip(self.targets, goals)):
            self._ledger.report("encode")
            self._parts.append(self._paper_start(target, empty))

            def visit(step: int, loss: float, part: Part, i: int = i, named: str = self._named(target)) -> None:
                self._learned(i, part, loss, f"{named}trajectory {step + 1} of {recipe.steps}")

            self._parts[i] = train_paper(self.backbone, prompts, goal, empty, self._parts[i], recipe.steps,
                                         recipe.learning_rate, recipe.guidance, recipe.sampling_steps, self._generator,
                                         visit, self._away())  # fmt: skip
        self._keep()

    def _paper_start(self, target: str, empty: Entry) -> Part:
        return paper_part(target, empty, self._generator)

    def _report(self) -> None:
        """The region's own numbers, and pictures."""
        self.numbers |= {"steps": self.recipe.steps, "seconds": round(time.monotonic() - self._began, 1)}
        self.numbers["stage_seconds"] = {name: round(spent, 1) for name, spent in self._ledger.seconds.items()}
        assert self.region is not None  # noqa: S101 - a stage before has set it
        done = {name: value for name, value in self.region.metadata.items() if name != UNFINISHED}
        self.region = replace(self.region, metadata=done | {"results": self.numbers})
        if self.draws() and processes.index() == 0:
            self.before_after = self._draw_before_after()
            self.region = previews.with_preview(self.region, self.before_after)
            self._ledger.report("report", message="before and after")

    # --- results ---

    def _keep(self) -> None:
        """The region as it is by now; an interrupt may leave it so."""
        steps = self._ledger.time.planned.get("discover", 0)
        stopped = f"stopped after {len(self.losses)} of {steps} steps" if steps else "stopped before its end"
        parts = (*map(detached, self._parts), *self._other_parts())
        measured = {"calibration": self.numbers.get("calibration", {}), UNFINISHED: stopped}
        self.region = Region(parts, self._about | measured)

    @cached_property
    def _about(self) -> dict[str, Any]:
        """What the region says of itself from the beginning of the run."""
        learned, recipe = self._learned_from()
        recipe["pairs_hash"] = hashlib.sha256(learned.encode()).hexdigest()[:16]
        return {
            "name": self.concept, "concept": self.concept, "created": date.today().isoformat(),
            "encoder": self.backbone.signature(), "recipe": self.recipe.describe() | recipe, **self._metadata(),
        }  # fmt: skip

    def _draw(self, entries: Sequence[Entry]) -> list[Image.Image]:
        empty = self.backbone.encode([""])[0]
        latents = sample(self.backbone, entries, empty, self.recipe.guidance, REPORT_STEPS, seed=self.recipe.seed)
        return [previews.to_image(picture) for picture in self.backbone.decode(latents)]

    @cached_property
    def _before(self) -> list[Image.Image]:
        """What the shown prompts draw without the region."""
        return self._draw(self.backbone.encode(self.shown_prompts()))

    def _after(self, prompts: Sequence[str], target: int) -> list[Image.Image]:
        """What prompts draw with the region, moved towards one target."""
        assert self.region is not None  # noqa: S101 - there is one as soon as there are moves
        return self._draw(self._moved(self.backbone.encode(prompts), self.region, target))

    def _preview(self, target: int) -> Image.Image:
        after = self._after(self.preview_prompts(), target)
        return previews.mosaic([self._before[: len(after)], after])

    def _draw_before_after(self) -> list[tuple[str, Image.Image, Image.Image]]:
        """Captions, and what prompts draw without the region and with it: prompts to be moved, towards each target, and
        two that should stay the same, with the first one."""
        opened, prompts = len(self.preview_prompts()), self.shown_prompts()
        after = [self._after(prompts if i == 0 else prompts[:opened], i) for i in range(len(self.targets))]
        rows = [(i, target) for i in range(opened) for target in range(len(self.targets))]
        rows += [(i, 0) for i in range(opened, len(prompts))]
        return [(self._caption(prompts[i], target, i < opened), self._before[i], after[target][i])
                for i, target in rows]  # fmt: skip

    # --- what is learned ---

    def walled_texts(self, states: dict[str, Tensor]) -> list[Tensor]:
        """The texts [N, T, D] of stacked prompts that walls are found in."""
        raise NotImplementedError

    @property
    def targets(self) -> Sequence[str]:
        """The labels of the parts that are learned."""
        raise NotImplementedError

    def _region_stages(self) -> list[Stage]:
        """Those of all presets but the paper's, without the report."""
        raise NotImplementedError

    def _example(self) -> str:
        """A prompt of usual length, or an empty one."""
        raise NotImplementedError

    def _rows(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Prompts to be moved, each with what it should become by target."""
        raise NotImplementedError

    def _goals(self, sides: Sequence[Sequence[Entry]], target: int) -> Sequence[Entry]:
        """What prompts should become for one target, of the encoded sides for all."""
        return sides[target]

    def _before_steps(self, part: Part, prompts: Sequence[str], entries: Sequence[Entry], moments: Sequence) -> Part:
        """The part as the steps through the diffusion model begin with it."""
        return part

    def _paper_prompts(self) -> list[str]:
        raise NotImplementedError

    def _paper_goals(self) -> list[str]:
        """The words for each target that the paper's recipe learns from, and `_away` from them or towards them."""
        raise NotImplementedError

    def _away(self) -> float:
        """See `train_paper`."""
        raise NotImplementedError

    def _learned_from(self) -> tuple[str, dict[str, Any]]:
        """All of it as text, and what the recipe in the region's metadata says about it."""
        raise NotImplementedError

    def _metadata(self) -> dict[str, Any]:
        """What the region says of itself beside what all of them say."""
        return {}

    def _other_parts(self) -> Sequence[Part]:
        """Parts beside those of the targets."""
        return ()

    def preview_prompts(self) -> list[str]:
        """What is drawn along the way; not learned from where there are enough."""
        raise NotImplementedError

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        raise NotImplementedError

    def _moved(self, entries: Sequence[Entry], region: Region, target: int) -> list[Entry]:
        """Entries as the region moves them towards one target."""
        raise NotImplementedError

    def _caption(self, prompt: str, target: int, opened: bool) -> str:
        """Below the pictures of a prompt; `opened`: one that is to be moved."""
        raise NotImplementedError


def detached(part: Part) -> Part:
    """The part without the history of its moves' tensors."""
    moves = {block: replace(move, **{name: tensor.detach() for name, tensor in move.tensors().items()})
             for block, move in part.moves.items()}  # fmt: skip
    return replace(part, moves=moves)

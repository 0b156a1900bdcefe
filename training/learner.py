"""What every training run shares: a list of stages, and a learner of moves towards one target or several.

A safe region has one target, the safe side of its pairs; an attribute has a target for each of its groups.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..backbones.protocol import Backbone
from ..backbones.sampling import sample
from ..region.blocks import block_names, key_of
from ..region.conditioning import Entry
from ..region.known import check_known
from ..region.region import Move, Part, Region
from ..region.verdict import UNFINISHED
from . import previews, processes
from .bags import BAGS, ENOUGH, Room, room_for
from .discovery import TOLD, collect_moments, discover, trajectory_predictions, trajectory_steps
from .gate import judged_all, statistics
from .instant import Averages, TokenStatistics, instant_move, moments_bytes, solving_bytes
from .paper_recipe import paper_part, paper_predictions, train_paper
from .progress import Ledger, Progress, Separation, measure, separation
from .recipe import REPORT_STEPS, Recipe
from .stages import Stage, costs, planned_steps
from .stream import Batch, batch_size, batches, read, read_whole
from .text_states import Source, cut, possible_sources, same_length, stacked, text_bytes
from .walls import CONTEXTS, SourceFit

SAMPLE, FEWEST, SETS = 256, 16, 4  # prompts in the sample of a set, and about so many sets
SHOWN = 64  # prompts of a kind in the picture of how deep they lie
SAMPLE_BYTES = 2**29  # of all samples: those of large encoders have fewer prompts
HEAP = 2**25  # bytes that the allocator keeps for itself, about
MOMENTS_BYTES = 2**30  # of moments that are collected at once
PRODUCTS, TOKENS_EACH = 2e12, 16  # of moments: products of two features at most, but so many tokens for each feature


def evenly(prompts: Sequence[str], most: int) -> list[str]:
    """So many of them at most, from all over the list; the first is one of them."""
    count = min(len(prompts), most)
    return [prompts[i * len(prompts) // count] for i in range(count)]


@dataclass(frozen=True)
class Half:
    """Prompts that moves are learned from, or chosen by: some to be moved, what they should become for each target, and
    others that should stay. They are read in batches."""

    moved: Sequence[str]
    goals: Sequence[Sequence[str]]
    still: Sequence[str]


class Moments:
    """Averages over the tokens of a half, by block."""

    def __init__(self, blocks: Mapping[str, tuple[Tensor, Tensor]], constant: Mapping[str, Tensor], targets: int,
                 share: float) -> None:  # fmt: skip
        """Args:
            blocks: mean and scale [D] of each.
            share: of the tokens that is looked at.
        """  # fmt: skip
        def make(seed: int, still: bool = False) -> dict[str, Averages]:
            return {block: Averages(*normal, constant.get(block), share, seed, still)
                    for block, normal in blocks.items()}  # fmt: skip

        self.wanted, self.still = [make(i) for i in range(targets)], make(targets, still=True)

    def add_moved(self, moved: Mapping[str, Tensor], goals: Sequence[Mapping[str, Tensor]], number: int) -> None:
        """Stacked prompts and what they should become; `number`: of the batch."""
        for averages, goal in zip(self.wanted, goals):
            for block, one in averages.items():
                if key_of(block) in moved and key_of(block) in goal:
                    one.add(*same_length(cut(moved, block), cut(goal, block)), number)

    def add_still(self, states: Mapping[str, Tensor], number: int) -> None:
        for block, one in self.still.items():
            if key_of(block) in states:
                tokens = cut(states, block)
                one.add(tokens, tokens, number)


class Learner:
    """One run. `region` is the best region so far, or None: it stays usable when the run is interrupted.

    What is learned, and from which prompts, is said by the classes that build on it.
    """

    kinds: ClassVar[tuple[str, str]] = ("harmless", "unsafe")  # prompts that should be inside, and outside
    contexts: ClassVar[Sequence[float]] = CONTEXTS[:1]  # what there are walls to choose from with, see `WallFit`

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
        self._done = 0  # prompts that were read, of those that were planned
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
        """A long prompt, as the text encoder has it: three quarters are shorter. Raises RegionError where no region
        could reach it."""
        by_length = sorted(self._taught_prompts(), key=len) or [""]
        (found,) = self.backbone.encode([by_length[len(by_length) * 3 // 4]])
        check_known([found], allow_unknown=True)  # what has an unknown name may well be no text
        return found

    @cached_property
    def prompt_bytes(self) -> int:
        """What the text states of one prompt take."""
        return text_bytes(self.example)

    @property
    def _batch(self) -> int:
        """How many prompts are read at once."""
        return batch_size(self.prompt_bytes)

    @cached_property
    def _example_states(self) -> dict[str, Tensor]:
        return stacked([self.example])

    @property
    def _block_widths(self) -> dict[str, int]:
        """The features of each block that may be moved."""
        return {block: cut(self._example_states, block).shape[-1] for block in block_names(self._example_states)}

    @cached_property
    def text_width(self) -> int:
        """The features of all texts that walls may stand in."""
        states = self._example_states
        return sum(cut(states, one.block)[..., one.begin : one.end].shape[-1] for one in possible_sources(states))

    @property
    def text_length(self) -> int:
        """Tokens of a long prompt."""
        return max(tensor.shape[-2] for tensor in self._example_states.values())

    @cached_property
    def _room(self) -> Room:
        """What is kept of prompts for their walls."""
        return room_for(self._bagged(), self.text_width)

    @property
    def _renews(self) -> bool:
        """Whether tokens are collected again when the walls stand nearly where they will."""
        return self._room.share < 1 or self._room.size < ENOUGH

    def text_bytes(self) -> int:
        """About what text takes while a region is learned from it: the most of what its stages take."""
        if self.recipe.preset == "paper":
            return self.prompt_bytes * len(self._paper_prompts())
        widths = self._block_widths.values()
        moments = [moments_bytes(width, len(self.targets)) for width in widths]
        kept = min(sum(moments), max(MOMENTS_BYTES, max(moments)))
        bags = 2 * self.text_width * min(self._bagged(), BAGS) * (min(self._room.size, self.text_length) + 1)
        sampled = SETS * min(SAMPLE, SAMPLE_BYTES // (SETS * self.prompt_bytes))
        looking, learning = 2 * sampled * self.prompt_bytes, bags + kept + 8 * self._batch * self.prompt_bytes
        finding, solving = 2 * bags + kept, kept + solving_bytes(max(widths))
        return HEAP + max(looking, learning, finding, solving)

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
            Stage("encode", targets, self._learn_as_paper, encodings=prompts),
            Stage("discover", targets * self.recipe.steps, predictions=predictions, gradients=gradients),
        ]

    def _report_stage(self) -> Stage:
        targets, (previewed, shown) = len(self.targets), self._drawn()
        drawn = shown + (targets - 1) * previewed  # what must stay the same with the first target only
        return Stage("report", int(self.draws()), self._report, encodings=shown + 1 + drawn + targets if shown else 0,
                     predictions=self._pictures(shown + drawn), alone=True)  # fmt: skip

    def _reading(self, lists: Iterable[Sequence[str]], do: Callable[[], None] | None) -> Stage:
        """The stage that encodes these prompts."""
        counts = [len(prompts) for prompts in lists]
        return Stage("encode", sum(batches(count, self._batch) for count in counts), do, sum(counts))

    # --- stages ---

    def _read(self, *sides: Sequence[str], planned: bool = True) -> Iterator[Batch]:
        """Prompts in batches; of several lists of the same length beside one another."""

        return read(self.backbone, *sides, size=self._batch, tell=self._tell if planned else lambda *done: None)

    def _tell(self, steps: int, prompts: int) -> None:
        """So many batches and prompts more were read."""
        self._done += prompts
        self._ledger.report("encode", steps, message=f"{self._done:,} of {self._to_read:,} prompts")

    def _each(
        self, judge: Callable[[dict[str, Tensor]], Tensor], *sides: Sequence[str],
        also: Callable[[Batch], None] = lambda batch: None, planned: bool = True,
    ) -> Tensor:  # fmt: skip
        """What `judge` says of stacked prompts [N] or [S, N], of all of the first list. `also` sees each batch, too."""
        found = []
        for batch in self._read(*sides, planned=planned):
            found.append((batch.number, judge(batch.sides[0])))
            also(batch)
        return torch.cat([depths for _, depths in processes.in_order(found)], -1)

    @cached_property
    def _to_read(self) -> int:
        """How many prompts are encoded for what is learned from text."""
        return sum(stage.encodings for stage in self.stages if stage.name == "encode")

    def _some(self, prompts: Sequence[str], most: int = SAMPLE) -> list[str]:
        """A sample, from all over a list; the first prompt is in it."""
        return evenly(prompts, min(max(SAMPLE_BYTES // (SETS * self.prompt_bytes), FEWEST), most))

    def _sample(self, prompts: Sequence[str], most: int = SAMPLE) -> dict[str, Tensor]:
        """Some of a list's prompts, stacked."""
        return read_whole(self.backbone, self._some(prompts, most), self._batch, self._tell)

    def _told_apart(self, inside: Tensor, outside: Tensor) -> Separation | None:
        """By the depths of prompts of both kinds."""
        return separation(inside, outside, self.kinds)

    def _grouped(self, widths: Mapping[str, int]) -> list[list[str]]:
        """Blocks in groups whose moments fit into memory beside one another: for each the prompts are read anew."""
        found, taken = [[]], 0
        for block, width in widths.items():
            size = moments_bytes(width, len(self.targets))
            if found[-1] and taken + size > MOMENTS_BYTES:
                found.append([])
                taken = 0
            found[-1].append(block)
            taken += size
        return found

    def _turns_stage(self, *halves: Half) -> Stage:
        """Where there are several groups of blocks, as many more readings of both halves."""
        turns = len(self._grouped(self._block_widths)) - 1
        lists = [prompts for half in halves for prompts in (half.moved, *half.goals, half.still)]
        return self._reading(lists * turns, None)

    def _moments(self, group: Sequence[str]) -> Moments:
        blocks = {block: self._normal[block] for block in group}
        width = max((len(mean) for mean, _ in blocks.values()), default=1)
        tokens = max(PRODUCTS / width**2, TOKENS_EACH * width)
        share = tokens / max(self._tokens * len(self._halves[0].moved), 1)
        return Moments(blocks, self._constant, len(self.targets), min(share, 1.0))

    def _begin_moments(
        self, blocks: Sequence[str], judged_block: str, fits: Sequence[SourceFit], moved: dict[str, Tensor],
        still: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Of both halves, of the first ones of these blocks.

        Args:
            judged_block: which says how many tokens of a prompt count.
            moved, still: stacked samples of what is to be moved, and to stay.
        """
        counts = judged_all(cut(moved, judged_block), self._constant.get(judged_block))
        self._tokens = float(counts.sum()) / len(counts)
        self._normal = {block: self._normalised(block, fits, (moved, still)) for block in blocks}
        first, *_ = self._grouped({block: len(mean) for block, (mean, _) in self._normal.items()})
        self._begun = (self._moments(first), self._moments(first))

    def _collect(self, half: Half, moments: Moments) -> None:
        """Read a half for its moments alone."""
        for batch in self._read(half.moved, *half.goals):
            moved, *goals = batch.sides
            moments.add_moved(moved, self._goal_states(goals), batch.number)
        for batch in self._read(half.still):
            moments.add_still(self._staying(batch.states), batch.number)

    def _first_moves(self) -> list[dict[str, Move]]:
        """Moves without the diffusion model, by target and block; what they were fitted to stays in `_text`."""
        moves: list[dict[str, Move]] = [{} for _ in self.targets]
        self._text = [{} for _ in self.targets]
        groups = self._grouped({block: len(mean) for block, (mean, _) in self._normal.items()})
        for number, blocks in enumerate(groups):
            halves = self._begun if number == 0 else (self._moments(blocks), self._moments(blocks))
            if number:
                for half, moments in zip(self._halves, halves):
                    self._collect(half, moments)
            for block in blocks:
                still, held_still = (half.still[block].result() for half in halves)
                for i in range(len(self.targets)):
                    wanted, tried = (half.wanted[i][block].result() for half in halves)
                    self._text[i][block], moves[i][block] = self._first_move(block, wanted, still, tried, held_still)
        self._ledger.close("encode")
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

    def _normalised(self, block: str, fits: Sequence[SourceFit], both: Sequence[Mapping[str, Tensor]]) -> tuple[
        Tensor, Tensor]:  # fmt: skip
        """Mean and scale [D] for a block's moves: those of its walls, or of samples."""
        for one in fits:
            if one.source == Source(block):
                return one.start.mean, one.start.scale
        states = [cut(encoded, block) for encoded in both]
        return statistics(states, [judged_all(tokens, self._constant.get(block)) for tokens in states])

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

    def count_prompts(self) -> int:
        """How many are learned from, calibrated and checked with."""
        raise NotImplementedError

    def _bagged(self) -> int:
        """In how many prompts walls are found."""
        raise NotImplementedError

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

    def _taught_prompts(self) -> Sequence[str]:
        """Those that the user wrote to be moved."""
        raise NotImplementedError

    def _rows(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Prompts to be moved, each with what it should become by target."""
        raise NotImplementedError

    def _goal_states(self, sides: Sequence[dict[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """What prompts should become for each target, of the stacked sides for all."""
        return sides

    def _staying(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of stacked harmless prompts that are to stay."""
        return states

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

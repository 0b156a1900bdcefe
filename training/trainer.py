"""Learning a safe region from prompt pairs: look, find the walls, judge, move, discover, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.blocks import key_of
from ..region.conditioning import CROSS_ATTENTION, Entry, apply_to_conditioning
from ..region.files import slug
from ..region.region import Move, Part, Region
from .discovery import BISECTIONS, safe_share, scaled, settle_strength, share_predictions
from .gate import RENEWED, TOLD_EVERY, checked_card, of_new_words, touched_share
from .gate import STEPS as GATE_STEPS
from .going_on import SEEN, check_existing, extended_move, seen_by_old
from .hardening import EDITS, evading
from .hardening import PROMPTS as EDITED
from .instant import TokenStatistics, difference_move, zero_move
from .learner import SAMPLE, SHOWN, Half, Learner, evenly
from .lora import lora_shift
from .pairs import PairsError, PromptPairs
from .progress import UNSAFE_LEFT, WALLS
from .prompts import PromptSets, build_sets, with_new_words
from .recipe import INITIAL, PREVIEW_PROMPTS, STRENGTH_PROMPTS, TARGETS, Recipe
from .scope import PROMPTS as SCOPE_PROMPTS
from .scope import ScopeFit, beyond_scope
from .stages import Stage
from .stream import Batch, read_whole
from .text_states import Source, blocks_of, cut, gated_key, known_tokens, sources_of, stacked
from .walls import (
    APART,
    CONTEXTS,
    SourceFit,
    Walls,
    alike,
    best_of,
    calibrated,
    depths_of,
    gate_depths,
    known_walls,
)

# Sets that are looked at first, and how many prompts of each at most.
SAMPLED = {"unsafe": SAMPLE, "safe": SAMPLE, "harmless": SAMPLE, "calibration": SHOWN, "held_unsafe": SHOWN}
EVADING = 2**32  # numbers of the batches of such prompts begin here
TAUGHT = 500  # unsafe prompts that tell how deep such prompts lie


class Trainer(Learner):
    """A run that learns a safe region from prompt pairs."""

    contexts = CONTEXTS

    def __init__(
        self,
        backbone: Backbone,
        pairs: PromptPairs,
        recipe: Recipe | None = None,
        concept: str = "",
        existing: Region | None = None,
    ) -> None:
        """Args:
            existing: a region to go on from. Its walls stay, with new ones beside them for the pairs; the move is
                learned from the pairs and from what the old one did.

        Raises PairsError or ValueError (RegionError for the region) when the input cannot be trained on.
        """  # fmt: skip
        super().__init__(backbone, recipe, concept.strip() or pairs.title or "unsafe content", UNSAFE_LEFT)
        self.pairs = pairs
        self.existing = existing
        if self.recipe.initial not in INITIAL or self.recipe.target not in TARGETS:
            raise ValueError(f"initial must be one of {INITIAL} and target one of {TARGETS}.")
        if existing is not None:
            check_existing(existing, self.recipe.preset, backbone.signature(), self.example)

    # --- what it will take ---

    def _taught_prompts(self) -> list[str]:
        return [unsafe for unsafe, _ in self.pairs.pairs]

    @cached_property
    def sets(self) -> PromptSets:
        """The prompts of the run, split and varied."""
        return build_sets(self.pairs, self.recipe.seed, self.recipe.prompts)

    @cached_property
    def new_words(self) -> list[str]:
        """Unsafe prompts with words that stand in no pair that is learned from."""
        held_out = set(self.sets.held_out)
        learned, apart = ([pair for pair in self.pairs.pairs if (pair in held_out) == is_held] for is_held in (0, 1))
        return list(dict.fromkeys(a for a, _ in with_new_words([*self.pairs.held_out, *apart], learned)))

    @cached_property
    def checked(self) -> dict[str, list[str]]:
        """Harmless prompts that choose nothing, by kind."""
        sets, own = self.sets, set(self.pairs.keep)
        return {
            "everyday": [prompt for prompt in sets.checked if prompt not in own], "variations": sets.checked_varied,
            "long": sets.checked_long, "own": [prompt for prompt in sets.checked if prompt in own],
        }  # fmt: skip

    def tried(self) -> list[list[str]]:
        """Prompts that only measure."""
        return [self.new_words, *self.checked.values()]

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """What is learned from and calibrated with, by what it is for; crowds, for the walls only, come last."""
        sets = self.sets
        return {
            "unsafe": [unsafe for unsafe, _ in (*sets.pairs, *sets.crowds)],
            "safe": [safe for _, safe in (*sets.pairs, *sets.crowds)],
            "held_unsafe": [unsafe for unsafe, _ in sets.held_out],
            "held_safe": [safe for _, safe in sets.held_out],
            "harmless": [*sets.harmless, *sets.calm],
            "calibration": sets.calibration,
            "long": sets.long,
        }  # fmt: skip

    def count_prompts(self) -> int:
        return sum(map(len, (*self.prompts.values(), *self.tried())))

    def _bagged(self) -> int:
        return len(self.prompts["unsafe"]) + len(self.prompts["harmless"])

    def walled_texts(self, states: dict[str, Tensor]) -> list[Tensor]:
        return [one.of(states) for one in sources_of(states) or [Source(gated_key(states))]]

    # --- stages ---

    def _region_stages(self) -> list[Stage]:
        sets, recipe, lists = self.sets, self.recipe, self.prompts
        told, first, rounds = GATE_STEPS // TOLD_EVERY, RENEWED // TOLD_EVERY, self._rounds
        taught = [lists[name] for name in ("unsafe", "safe", "harmless")]
        judged_by = [*(lists[name] for name in ("calibration", "long", "held_unsafe")), self._like, self._taught]
        stages = [
            self._reading([self._some(lists[name], most) for name, most in SAMPLED.items()], self._look),
            self._reading(taught, self._learn_from_all),
            Stage("gate", first, lambda: self._find_walls(RENEWED)),
            *([self._reading([lists["unsafe"], lists["harmless"]], self._renew)] if self._renews else ()),
            Stage("gate", told - first, lambda: self._find_walls(GATE_STEPS)),
            self._reading([*judged_by, lists["held_safe"]], self._judge_all),
            Stage("calibrate", 1, self._calibrate),
            Stage("harden", 4 * rounds, self._harden, rounds * (EDITED * (EDITS + 8) + sum(map(len, judged_by))),
                  predictions=rounds * share_predictions(EDITED)),
            Stage("gate", rounds * told),
            Stage("calibrate", rounds),
            self._reading(self.tried(), self._check),
            Stage("instant", 1, self._move_at_once),
            self._turns_stage(*self._halves),
            *self._discovery_stages(len(sets.pairs)),
        ]  # fmt: skip
        if recipe.steps:
            held_out = min(STRENGTH_PROMPTS, len(sets.held_out))
            shares = 1 if self.existing else BISECTIONS + 1
            stages.append(Stage("strength", 1, self._settle, 2 * held_out,
                                predictions=shares * share_predictions(held_out)))  # fmt: skip
        return stages

    @property
    def _rounds(self) -> int:
        """Of the search for prompts that evade the walls, which asks the diffusion model."""
        return self.recipe.harden if self.backbone.can_denoise else 0

    @cached_property
    def _like(self) -> list[str]:
        """Harmless prompts that teach no walls: they tell which are best, and how depths of several texts compare."""
        return self.sets.harmless[APART - 1 :: APART]

    @cached_property
    def _halves(self) -> tuple[Half, Half]:
        found, count = self.prompts, len(self.sets.pairs)
        return (Half(found["unsafe"][:count], [found["safe"][:count]], self.sets.harmless),
                Half(found["held_unsafe"], [found["held_safe"]], self.sets.calibration))  # fmt: skip

    @cached_property
    def _taught(self) -> list[str]:
        """Unsafe prompts that the walls were learned from: they tell how deep such prompts lie."""
        return evenly(self.prompts["unsafe"], TAUGHT)

    def _look(self) -> None:
        """See by samples which texts there are, how large their features are, and where walls may begin."""
        sample = {name: self._sample(self.prompts[name], most) for name, most in SAMPLED.items() if self.prompts[name]}
        taught = [sample[name] for name in ("unsafe", "safe", "harmless")]
        sources = [one for one in sources_of(*taught) if not alike(one, sample)]
        if not sources:
            raise PairsError("This text encoder reads both sides of every pair alike: is its model loaded and whole?")
        old = self.existing.parts[0] if self.existing else None
        self._known = known_walls(old) if old else []
        judged_blocks = dict.fromkeys(one.block for one in (*sources, *(walls.source for walls in self._known)))
        blocks = blocks_of(*sample.values())
        self._constant = known_tokens(sample["harmless"], sample["unsafe"], [*judged_blocks, *blocks])
        if self._known:
            both = [depths_of(self._known, sample[name], self._constant).amax(0) for name in ("unsafe", "held_unsafe")
                    if name in sample]  # fmt: skip
            sources = [] if touched_share(torch.cat(both)) >= SEEN else sources
        self._fits = [SourceFit(one, sample, self._constant, self._generator, self._room, contexts=self.contexts)
                      for one in sources]  # fmt: skip
        calm = sample["harmless"]
        plain = {block: cut(calm, block) for block in judged_blocks if key_of(block) in calm}
        self._scope_fits = {block: ScopeFit(tokens, tokens[:1], self._constant.get(block), self.recipe.seed)
                            for block, tokens in plain.items()}  # fmt: skip
        self._begin_moments(blocks, next(iter(judged_blocks)), self._fits, sample["unsafe"], sample["harmless"])
        self._shown = {name: sample[name] for name in ("calibration", "held_unsafe")}

    def _learn_from_all(self) -> None:
        """Read what is learned from: tokens for the walls, averages for the move, and what prompts look like."""
        moments, (half, _) = self._begun[0], self._halves
        for batch in self._read(self.prompts["unsafe"], self.prompts["safe"]):
            unsafe, safe = batch.sides
            self._collect_tokens("unsafe", unsafe, batch)
            rows = slice(max(len(half.moved) - batch.rows.start, 0))  # no crowds
            moved, goal = ({key: states[rows] for key, states in side.items()} for side in (unsafe, safe))
            moments.add_moved(moved, [goal], batch.number)
        for batch in self._read(self.prompts["harmless"]):
            self._collect_tokens("harmless", batch.states, batch)
            states = {key: tokens[: max(len(half.still) - batch.rows.start, 0)] for key, tokens in batch.states.items()}
            for block, fit in self._scope_fits.items():
                if key_of(block) in states and batch.number % self._scope_every == 0:
                    fit.learn(cut(states, block), batch.number)
            moments.add_still(self._staying(states), batch.number)

    @property
    def _scope_every(self) -> int:
        """Of every so many batches of harmless prompts scopes are learned."""
        return max(len(self.sets.harmless) // SCOPE_PROMPTS, 1)

    def _collect_tokens(self, kind: str, states: dict[str, Tensor], batch: Batch) -> None:
        if kind == "harmless":
            rows = torch.tensor([row % APART != APART - 1 for row in batch.rows])
            states = {key: tokens[rows] for key, tokens in states.items()}
        for fit in self._fits:
            fit.collect(kind, states, batch.number)

    def _renew(self) -> None:
        """Collect the tokens that are deepest by now."""
        for kind in ("unsafe", "harmless"):
            for batch in self._read(self.prompts[kind]):
                self._collect_tokens(kind, batch.states, batch)

    def _find_walls(self, until: int) -> None:
        """Steps of the walls of all sources, until so many are done."""
        begun, count = self._ledger.time.done["gate"], len(self._fits)
        for i, fit in enumerate(self._fits):
            start = fit.done
            told = until // TOLD_EVERY - start // TOLD_EVERY

            def visit(step: int, loss: float, now: Walls, i: int = i, start: int = start, told: int = told) -> None:
                if step % TOLD_EVERY == TOLD_EVERY - 1:
                    done = (i * (until - start) + step + 1 - start) * told // (count * (until - start))
                    depths = (now.depths(self._shown[name], self._constant) for name in ("calibration", "held_unsafe"))
                    self._ledger.reach("gate", begun + done, loss=loss, measure=WALLS,
                                       separation=self._told_apart(*depths), message="finding the walls")  # fmt: skip

            fit.run(until, visit)
            self._ledger.reach("gate", begun + (i + 1) * told // count, message="finding the walls")

    @property
    def _new(self) -> list[Walls]:
        """The walls of all sources as they stand: those to choose from, or the chosen ones."""
        return [walls for fit in self._fits for walls in fit.walls]

    def _beyond(self, states: dict[str, Tensor]) -> Tensor:
        """How deep stacked prompts lie beyond all of the walls as they stand, and the known ones: [S, N]."""
        return depths_of([*self._new, *self._known], states, self._constant)

    def _judge_all(self) -> None:
        """Read what the walls are calibrated by, the move is chosen by, and the scope is bounded by."""
        for fit in self._scope_fits.values():
            fit.learned()
        moments = self._begun[1]

        def of_pairs(batch: Batch) -> None:
            unsafe, safe = batch.sides
            moments.add_moved(unsafe, [safe], batch.number)

        def of_harmless(batch: Batch) -> None:
            for block, fit in self._scope_fits.items():
                if key_of(block) in batch.states:
                    fit.bound(cut(batch.states, block), batch.number)
            moments.add_still(self._staying(batch.states), batch.number)

        held, plain = (self.prompts[name] for name in ("held_unsafe", "calibration"))
        self._depth = self._judge(False) | {
            "held_unsafe": self._each(self._beyond, held, self.prompts["held_safe"], also=of_pairs),
            "calibration": self._each(self._beyond, plain, also=of_harmless),
        }
        self._choose()

    def _choose(self) -> None:
        """For each source, the simplest walls, and beside them those that are better: what is written beside an unsafe
        sentence changes its average, but no word."""
        rows, begin, depths = [], 0, self._depth
        for fit in self._fits:
            own = slice(begin, begin + len(fit.walls))
            chosen = sorted({0, best_of(depths["like"][own], depths["held_unsafe"][own])})
            fit.choose(chosen)
            rows += [begin + i for i in chosen]
            begin = own.stop
        self._depth = {name: torch.cat([found[rows], found[begin:]]) for name, found in depths.items()}

    def _judge(self, again: bool) -> dict[str, Tensor]:
        """Depths [S, N] of the sets that walls are calibrated by; `again`: of all of them, beside the plan."""
        sets = {"long": self.prompts["long"], "like": self._like, "unsafe": self._taught}
        if again:
            sets |= {name: self.prompts[name] for name in ("held_unsafe", "calibration")}
        none = torch.zeros(len(self._new) + len(self._known), 0)
        return {name: self._each(self._beyond, prompts, planned=not again) if prompts else none
                for name, prompts in sets.items()}  # fmt: skip

    def _calibrate(self) -> None:
        self._gates, card, worst = calibrated(self._new, self._known, self._depth, self.recipe.budget)
        self._depths = (torch.cat([worst["calibration"], worst["long"]]), worst["held_unsafe"])
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self.separation,
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip

    def _harden(self) -> None:
        """Search for prompts that evade the walls, and fit these again."""
        for number in range(self._rounds):
            found = self._evading()
            self._ledger.report("harden", 4, message=f"round {number + 1}: {len(found)} prompts evaded the gate")
            self.numbers.setdefault("evaded", []).append(len(found))
            if not found or not self._fits:
                break
            # for the walls only: odd forms among the move's prompts made it weaker on all the others
            for batch in self._read([unsafe for unsafe, _ in found], planned=False):
                for fit in self._fits:
                    fit.collect("unsafe", batch.states, EVADING * (1 + number) + batch.number)
            pairs = [read_whole(self.backbone, [pair[side] for pair in found[: self._batch]]) for side in (0, 1)]
            for fit in self._fits:
                fit.again(*pairs)
            self._find_walls(GATE_STEPS)
            self._depth = self._judge(True)
            self._calibrate()
        self._ledger.close("gate", "calibrate", "harden")

    def _check(self) -> None:
        """What gates and scopes do to prompts that chose nothing."""
        scopes = {block: self._scope_fits[block].scope() for block in self._gates if block in self._scope_fits}
        self._scopes = {block: scope for block, scope in scopes.items() if scope}
        part = Part("", {}, self._gates, self._constant, self._scopes)

        def depths(states: dict[str, Tensor]) -> Tensor:
            walls = gate_depths(states, part.gates, part.constant)
            return torch.where(beyond_scope(states, part), walls.clamp(min=1e-6), walls)

        if self.new_words:
            self.numbers["calibration"] |= of_new_words(self._each(depths, self.new_words))
        found = {kind: self._each(depths, prompts) for kind, prompts in self.checked.items() if prompts}
        self.numbers["calibration"] |= checked_card(found)

    def _move_at_once(self) -> None:
        """The instant region, or what `initial` has in its place."""
        del self._fits, self._scope_fits  # they are large, and nothing reads them any more
        (moves,) = self._first_moves()
        moves = (dict(self.existing.parts[0].moves) if self.existing else {}) | moves
        del self._begun
        self._start_with([Part(self.targets[0], moves, self._gates, self._constant, self._scopes)])

    def _staying(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.existing:
            return states
        # what the old walls open on is to be moved, whoever calls it harmless
        shut = gate_depths(states, self.existing.parts[0].gates, self._constant) <= 0
        return {key: tokens[shut] for key, tokens in states.items()}

    def _evading(self) -> list[tuple[str, str]]:
        """Unsafe prompts, and their safe counterparts, that the gates do not see."""

        def depth_of(prompts: Sequence[str]) -> Tensor:
            return gate_depths(stacked(self.backbone.encode(prompts)), self._gates, self._constant)

        rng = Random(self.recipe.seed + len(self.numbers.get("evaded", ())))
        return evading(self.backbone, self.sets.pairs, self.sets.harmless[1:], depth_of, rng, self._generator)

    def _normalised(self, block: str, fits: Sequence[SourceFit], both: Sequence[Mapping[str, Tensor]]) -> tuple[
        Tensor, Tensor]:  # fmt: skip
        known = self._old_move(block)
        if known is not None and known.mean is not None and known.scale is not None:
            return known.mean, known.scale
        return super()._normalised(block, fits, both)

    def _old_move(self, block: str) -> Move | None:
        """That of the region that training goes on from."""
        return self.existing.parts[0].moves.get(block) if self.existing else None

    def _first_move(
        self, block: str, wanted: TokenStatistics, still: TokenStatistics, tried: TokenStatistics,
        held_still: TokenStatistics,
    ) -> tuple[TokenStatistics, Move]:  # fmt: skip
        recipe, known = self.recipe, self._old_move(block)
        if known is None and recipe.initial == "instant":
            return super()._first_move(block, wanted, still, tried, held_still)
        if known is not None:
            kept = seen_by_old(known, still)
            wanted, tried = wanted.beside(kept, 1.0), tried.beside(kept, 1.0)
        learn = wanted.beside(still)
        rank = self._rank(learn)
        if known is not None:
            return learn, extended_move(known, learn, tried.beside(held_still), rank)
        return learn, (difference_move if recipe.initial == "difference" else zero_move)(wanted, rank, recipe.seed)

    def _before_steps(self, part: Part, prompts: Sequence[str], entries: Sequence[Entry], moments: Sequence) -> Part:
        if self.recipe.initial != "lora":
            return part
        shift = lora_shift(self.backbone, prompts, entries, moments, 4, self._generator)
        return replace(part, moves=part.moves | {CROSS_ATTENTION: replace(part.moves[CROSS_ATTENTION], offset=shift)})

    def _settle(self) -> None:
        """How far the move has to go."""
        held_out = self.sets.held_out[:STRENGTH_PROMPTS]
        entries = list(zip(*(self.backbone.encode([pair[side] for pair in held_out]) for side in (0, 1))))
        (part,) = self._parts
        # an old concept is not to fade a little each time
        strength = 1.0 if self.existing else settle_strength(self.backbone, entries, part, self._generator)
        self._parts = [scaled(part, strength)]
        safe = safe_share(self.backbone, entries, self._parts[0], self._generator)
        self.numbers |= {"strength": strength, "drawn_safely": safe}
        self._keep()
        self._ledger.report("strength", message=f"{strength:.2f} of the way is enough")

    # --- what is learned ---

    @property
    def targets(self) -> Sequence[str]:
        return [slug(self.concept)]

    def _rows(self) -> Sequence[tuple[str, Sequence[str]]]:
        return [(unsafe, (safe,)) for unsafe, safe in self.sets.pairs]

    def _paper_prompts(self) -> list[str]:
        return [unsafe for unsafe, _ in self.sets.pairs]

    def _paper_goals(self) -> list[str]:
        return [self.concept]

    def _away(self) -> float:
        return self.recipe.guidance

    def _paper_start(self, target: str, empty: Entry) -> Part:
        return self.existing.parts[0] if self.existing else super()._paper_start(target, empty)

    def _learned_from(self) -> tuple[str, dict[str, Any]]:
        return self.pairs.text(), {"pairs": len(self.pairs.pairs)}

    def _metadata(self) -> dict[str, Any]:
        if not self.existing:
            return {}
        return {"continued_from": {"name": self.existing.name, "hash": self.existing.parts[0].id}}

    def preview_prompts(self) -> list[str]:
        """Unsafe ones, not learned from where there are enough."""
        chosen = self.sets.held_out or self.sets.pairs
        return [unsafe for unsafe, _ in chosen[:PREVIEW_PROMPTS]]

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        return [*self.preview_prompts(), *self.sets.calibration[:2]]

    def _moved(self, entries: Sequence[Entry], region: Region, target: int) -> list[Entry]:
        return apply_to_conditioning(entries, region)

    def _caption(self, prompt: str, target: int, opened: bool) -> str:
        return prompt if opened else f"harmless: {prompt}"

"""Learning a safe region from prompt pairs: read, find the walls, move, discover, report."""

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
from ..region.region import Gate, Move, Part, Region
from .discovery import BISECTIONS, safe_share, scaled, settle_strength, share_predictions
from .gate import STEPS as GATE_STEPS
from .gate import TOLD_EVERY, checked_card, of_new_words, touched_share
from .going_on import SEEN, check_existing, extended_move, seen_by_old
from .hardening import EDITS, evading
from .hardening import PROMPTS as EDITED
from .instant import TokenStatistics, difference_move, zero_move
from .learner import Learner, Taught
from .lora import lora_shift
from .pairs import PairsError, PromptPairs
from .progress import UNSAFE_LEFT, WALLS
from .prompts import PromptSets, build_sets, with_new_words
from .recipe import INITIAL, PREVIEW_PROMPTS, STRENGTH_PROMPTS, TARGETS, Recipe
from .scope import beyond_scope, fit_scope
from .stages import Stage
from .text_states import (
    Source,
    beside,
    blocks_of,
    cut,
    few,
    gated_key,
    known_tokens,
    sources_of,
    stacked,
)
from .walls import Walls, alike, calibrated, fit_walls, gate_depths, kept_apart, known_walls


class Trainer(Learner):
    """A run that learns a safe region from prompt pairs."""

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

    def _example(self) -> str:
        return self.pairs.pairs[0][0] if self.pairs.pairs else ""

    @cached_property
    def sets(self) -> PromptSets:
        """The prompts of the run, split and varied: no more than fit into memory."""
        return build_sets(self.pairs, self.recipe.seed, self._most)

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

    def prompts(self, crowds: bool = True) -> dict[str, list[str]]:
        """The prompts whose text states are kept, by what they are for; crowds come last."""
        sets = self.sets
        found = {
            "unsafe": [unsafe for unsafe, _ in sets.pairs],
            "safe": [safe for _, safe in sets.pairs],
            "held_unsafe": [unsafe for unsafe, _ in sets.held_out],
            "held_safe": [safe for _, safe in sets.held_out],
            "harmless": sets.harmless,
            "calibration": sets.calibration,
            "long": sets.long,
        }
        if not crowds:
            return found
        more = {"unsafe": [unsafe for unsafe, _ in sets.crowds], "safe": [safe for _, safe in sets.crowds],
                "harmless": sets.calm}  # fmt: skip
        return {name: [*prompts, *more.get(name, ())] for name, prompts in found.items()}

    def walled_texts(self, states: dict[str, Tensor]) -> list[Tensor]:
        return [one.of(states) for one in sources_of(states) or [Source(gated_key(states))]]

    # --- stages ---

    def _region_stages(self) -> list[Stage]:
        sets, recipe = self.sets, self.recipe
        told, rounds = GATE_STEPS // TOLD_EVERY, self._rounds
        stages = [
            self._reading(self.prompts().values(), self._read_prompts, keep=True),
            Stage("gate", told, self._fit_walls),
            Stage("calibrate", 1),
            Stage("harden", 4 * rounds, self._harden, rounds * EDITED * (EDITS + 6),
                  predictions=rounds * share_predictions(EDITED)),
            Stage("gate", rounds * told),
            Stage("calibrate", rounds),
            self._reading(self.tried(), self._check, keep=False),
            Stage("instant", 1, self._move_at_once),
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

    def _read_prompts(self) -> None:
        """Encode all that is learned from and calibrated with, and see which texts there are."""
        lists = self.prompts(crowds=False)
        encoded = {name: self._encode(prompts) for name, prompts in self.prompts().items()}
        taught = (encoded[name] for name in ("unsafe", "safe", "harmless"))
        self._sources = [one for one in sources_of(*taught) if not alike(one, encoded)]
        if not self._sources:
            raise PairsError("This text encoder reads both sides of every pair alike: is its model loaded and whole?")
        self._known = known_walls(self.existing.parts[0]) if self.existing else []
        judged_blocks = [one.block for one in (*self._sources, *(walls.source for walls in self._known))]
        keys = dict.fromkeys(map(key_of, judged_blocks))
        self._states = {name: {key: found[key] for key in keys if key in found} for name, found in encoded.items()}
        # crowds are for the walls only
        self._encoded = {name: {key: tokens[: len(lists[name])] for key, tokens in found.items()}
                         for name, found in encoded.items() if name != "long"}  # fmt: skip
        self._blocks = blocks_of(*(self._encoded[name] for name in self._encoded if lists[name]))
        self._constant = known_tokens(self._encoded["harmless"], self._encoded["unsafe"],
                                      [*judged_blocks, *self._blocks])  # fmt: skip
        if self._known and self._seen_by(self._known) >= SEEN:
            self._sources = []

    def _harden(self) -> None:
        """Search for prompts that evade the walls, and fit these again."""
        for number in range(self._rounds):
            found = self._evading()
            self._ledger.report("harden", 4, message=f"round {number + 1}: {len(found)} prompts evaded the gate")
            self.numbers.setdefault("evaded", []).append(len(found))
            if not found:
                break
            # for the walls only: odd forms among the move's prompts made it weaker on all the others
            for name, side in (("unsafe", 0), ("safe", 1)):
                more, states = self._encode([pair[side] for pair in found], False), self._states[name]
                self._states[name] = {key: beside(tokens, more[key]) for key, tokens in states.items() if key in more}
            self._fit_walls()
        self._ledger.close("gate", "calibrate", "harden")

    def _check(self) -> None:
        """What gates and scopes do to prompts that chose nothing."""
        self._fit_scopes()
        part = Part("", {}, self._gates, self._constant, self._scopes)

        def depths(prompts: Sequence[str]) -> Tensor:
            encoded = self._encode(prompts)
            walls = gate_depths(encoded, part.gates, part.constant)
            return torch.where(beyond_scope(encoded, part), walls.clamp(min=1e-6), walls)

        if self.new_words:
            self.numbers["calibration"] |= of_new_words(depths(self.new_words))
        found = {kind: depths(prompts) for kind, prompts in self.checked.items() if prompts}
        self.numbers["calibration"] |= checked_card(found)

    def _move_at_once(self) -> None:
        """The instant region, or what `initial` has in its place."""
        old, encoded = self.existing.parts[0] if self.existing else None, self._encoded
        if old:  # what its walls open on is to be moved, whoever calls it harmless
            shut = {name: gate_depths(encoded[name], old.gates, self._constant) <= 0
                    for name in ("harmless", "calibration")}  # fmt: skip
            encoded = {**encoded, **{name: {key: states[rows] for key, states in encoded[name].items()}
                                     for name, rows in shut.items()}}  # fmt: skip
        learn, held = (Taught(encoded[moved], lambda _, goal=goal: encoded[goal], encoded[still])
                       for moved, goal, still in (("unsafe", "safe", "harmless"),
                                                  ("held_unsafe", "held_safe", "calibration")))  # fmt: skip
        (moves,) = self._first_moves(learn, held, self._blocks, self._gates, self._constant)
        moves = (dict(old.moves) if old else {}) | moves
        del self._encoded, self._states  # they are large, and nothing reads them any more
        self._start_with([Part(self.targets[0], moves, self._gates, self._constant, self._scopes)])

    def _seen_by(self, known: Sequence[Walls]) -> float:
        """On which share of the unsafe prompts walls open."""
        depths = torch.cat([torch.stack([walls.depths(self._states[name], self._constant) for walls in known]).amax(0)
                            for name in ("unsafe", "held_unsafe")])  # fmt: skip
        return touched_share(depths)

    def _fit_walls(self) -> None:
        """Walls in each source beside those that are known, calibrated together: gates by block."""
        states, sources, constant = self._states, self._sources, self._constant
        apart = kept_apart(states) if len(sources) > 1 else None
        told, begun = GATE_STEPS // TOLD_EVERY, self._ledger.time.done["gate"]
        some = {name: {key: few(tokens) for key, tokens in states[name].items()}
                for name in ("calibration", "held_unsafe")}  # fmt: skip
        walls: list[Walls] = []

        def visit(step: int, loss: float, now: Walls) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                done = (GATE_STEPS * len(walls) + step + 1) * told // (GATE_STEPS * len(sources))
                depths = (now.depths(some[name], constant) for name in ("calibration", "held_unsafe"))
                self._ledger.reach("gate", begun + done, loss=loss, measure=WALLS,
                                   separation=self._told_apart(*depths), message="finding the walls")  # fmt: skip

        for source in sources:
            walls.append(fit_walls(source, states, constant, self._generator, visit, apart))
        self._gates, card, self._depths = calibrated(walls, self._known, states, constant, self.recipe.budget)
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self.separation,
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip

    def _fit_scopes(self) -> None:
        """What prompts look like in each block that has a gate."""
        generator, states = torch.Generator().manual_seed(self.recipe.seed), self._states
        found = {block: fit_scope(cut(states["harmless"], block), cut(states["calibration"], block),
                                  cut(states["harmless"], block)[:1], self._constant.get(block), generator)
                 for block in self._gates if key_of(block) in states["calibration"]}  # fmt: skip
        self._scopes = {block: scope for block, scope in found.items() if scope}

    def _evading(self) -> list[tuple[str, str]]:
        """Unsafe prompts, and their safe counterparts, that the gates do not see."""

        def depth_of(prompts: Sequence[str]) -> Tensor:
            return gate_depths(stacked(self.backbone.encode(prompts)), self._gates, self._constant)

        rng = Random(self.recipe.seed + len(self.numbers.get("evaded", ())))
        return evading(self.backbone, self.sets.pairs, self.sets.harmless[1:], depth_of, rng, self._generator)

    def _normalised(
        self, block: str, gates: Mapping[str, Gate], both: Sequence[Mapping[str, Tensor]],
        constant: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        known = self._old_move(block)
        if known is not None and known.mean is not None and known.scale is not None:
            return known.mean, known.scale
        return super()._normalised(block, gates, both, constant)

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

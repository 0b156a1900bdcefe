"""Training a region from start to end: encode, gate, instant, discover, calibrate, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from random import Random

import torch
from PIL import Image
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import CROSS_ATTENTION, apply_to_conditioning
from ..region.files import slug
from ..region.region import Gate, Part, Region, RegionError
from . import processes, report
from .discovery import TRAJECTORY_BATCH, collect_moments, discover, safe_share, scaled, settle_strength
from .gate import SPARE, TOLD_EVERY, calibrate_gate, fit_gate, judged_all, prompt_depths, statistics
from .gate import STEPS as GATE_STEPS
from .hardening import evading
from .instant import TokenStatistics, difference_move, instant_move, token_statistics, zero_move
from .lora import lora_shift
from .pairs import PairsError, PromptPairs
from .paper_recipe import paper_part, train_paper
from .plan import Work, region_work
from .progress import UNSAFE_LEFT, WALLS
from .prompts import PromptSets, build_sets, with_new_words
from .recipe import INITIAL, PREVIEW_PROMPTS, STRENGTH_PROMPTS, TARGETS, Recipe
from .run import TrainingRun, detached
from .text_states import (
    batches,
    beside,
    blocks_of,
    cut,
    few,
    gated_key,
    known_tokens,
    same_length,
    stacked,
)


class Trainer(TrainingRun):
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
            existing: a region to go on from: its walls and its move are the starting point.

        Raises PairsError or ValueError when the input cannot be trained on.
        """  # fmt: skip
        super().__init__(backbone, recipe, concept.strip() or pairs.title or "unsafe content", UNSAFE_LEFT)
        self.pairs = pairs
        self.new_words = [unsafe for unsafe, _ in with_new_words(pairs.held_out, pairs.pairs)]
        self.existing = existing
        self._text: dict[str, TokenStatistics] = {}  # by block
        if self.recipe.initial not in INITIAL or self.recipe.target not in TARGETS:
            raise ValueError(f"initial must be one of {INITIAL} and target one of {TARGETS}.")
        if existing is not None and len(existing.parts) != 1:
            raise RegionError("Training can go on from a region with one concept; this one has several.")

    # --- what it will take ---

    def _example(self) -> str:
        return self.pairs.pairs[0][0] if self.pairs.pairs else ""

    @cached_property
    def sets(self) -> PromptSets:
        """The prompts of the run, split and varied: no more than fit into memory."""
        return build_sets(self.pairs, self.recipe.seed, self._most)

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
        }
        if not crowds:
            return found
        more = {"unsafe": [unsafe for unsafe, _ in sets.crowds], "safe": [safe for _, safe in sets.crowds],
                "harmless": sets.calm}  # fmt: skip
        return {name: [*prompts, *more.get(name, ())] for name, prompts in found.items()}

    def work(self) -> Work:
        """What the run has to do."""
        return region_work(self)

    def walls_are_fixed(self) -> bool:
        """Whether the walls are those of the existing region."""
        return self.existing is not None and bool(self.existing.parts[0].gates)

    # --- stages ---

    def count_steps(self) -> dict[str, int]:
        """Of each stage, in about the order in which they come."""
        sets, recipe = self.sets, self.recipe
        drawn = int(self.draws())
        if recipe.preset == "paper":
            return {"encode": 1, "discover": recipe.steps, "report": drawn}
        encoding = sum(batches(len(prompts)) for prompts in [*self.prompts().values(), self.new_words])
        moments = -(-min(recipe.trajectories, len(sets.pairs)) // TRAJECTORY_BATCH) * 4 if recipe.steps else 0
        harden = recipe.harden if self._searches() else 0
        gate = 0 if self.walls_are_fixed() else GATE_STEPS // TOLD_EVERY * (1 + harden)
        return {
            "encode": encoding, "gate": gate, "calibrate": 1 + harden, "harden": 4 * harden, "instant": 1,
            "trajectories": moments, "discover": recipe.steps, "preview": recipe.previews() * drawn,
            "strength": int(recipe.steps > 0), "report": drawn,
        }  # fmt: skip

    def _searches(self) -> bool:
        """Whether prompts that evade the walls can be searched for."""
        return self.backbone.can_denoise and not self.walls_are_fixed()

    def _run_region(self) -> None:
        recipe, lists = self.recipe, self.prompts(crowds=False)
        encoded = {name: self._encode(prompts) for name, prompts in self.prompts().items()}
        gated = gated_key(encoded["unsafe"])
        states = {name: found[gated] for name, found in encoded.items() if gated in found}
        if torch.equal(*same_length(states["unsafe"], states["safe"])):
            raise PairsError("This text encoder reads both sides of every pair alike: is its model loaded and whole?")
        # crowds are for the walls only
        encoded = {name: {key: tokens[: len(lists[name])] for key, tokens in found.items()}
                   for name, found in encoded.items()}  # fmt: skip
        blocks = blocks_of(*(encoded[name] for name in lists if lists[name]))
        constant = known_tokens(encoded["harmless"], encoded["unsafe"], [gated, *blocks])
        gate = self._fit_gate(states, gated, constant)
        for number in range(recipe.harden if self._searches() else 0):
            found = self._evading(gated, gate, constant.get(gated))
            self._ledger.report("harden", 4, message=f"round {number + 1}: {len(found)} prompts evaded the gate")
            self.numbers.setdefault("evaded", []).append(len(found))
            if not found:
                break
            # for the walls only: odd forms among the move's prompts made it weaker on all the others
            for name, side in (("unsafe", 0), ("safe", 1)):
                states[name] = beside(states[name], self._encode([pair[side] for pair in found], False)[gated])
            gate = self._fit_gate(states, gated, constant)
        if self.new_words:
            depths = prompt_depths(self._encode(self.new_words)[gated], gate, constant.get(gated))
            self.numbers["calibration"] |= report.of_new_words(depths)
        self._ledger.close("gate", "calibrate", "harden")
        part = processes.agreed(self._instant_part(encoded, blocks, gated, gate, constant))
        self._keep(part)
        self.losses += self._instant_losses(states, gate, constant.get(gated))
        self._ledger.report("instant", message="instant region ready")
        if recipe.steps:
            del encoded, states
            self._discover(part)

    def _fit_gate(self, states: dict[str, Tensor], block: str, constant: dict[str, Tensor]) -> Gate:
        existing = self.existing.parts[0].gates.get(block) if self.existing else None
        known = constant.get(block)

        def visit(step: int, loss: float, now: Gate) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                some = (prompt_depths(few(states[name]), now, known) for name in ("calibration", "held_unsafe"))
                self._ledger.report("gate", loss=loss, measure=WALLS, separation=self._told_apart(*some),
                                    message="finding the walls")  # fmt: skip

        gate = existing or fit_gate(states["unsafe"], states["safe"], states["harmless"], known, self._generator, visit)
        harmless, unsafe, held = states["calibration"], states["unsafe"], states["held_unsafe"]
        spare = 0.0 if existing else SPARE
        gate, calibration = calibrate_gate(gate, harmless, unsafe, held, known, self.recipe.budget, spare)
        self.numbers["calibration"] = calibration
        self._depths = (prompt_depths(harmless, gate, known), prompt_depths(held, gate, known))
        self._ledger.report("calibrate", separation=self._told_apart(*self._depths),
                            message=f"touches {calibration['harmless_touched']:.1%} of harmless prompts")  # fmt: skip
        return gate

    def _evading(self, block: str, gate: Gate, constant: Tensor | None) -> list[tuple[str, str]]:
        """Unsafe prompts, and their safe counterparts, that the gate does not see."""

        def depth_of(prompts: Sequence[str]) -> Tensor:
            return prompt_depths(stacked(self.backbone.encode(prompts))[block], gate, constant)

        rng = Random(self.recipe.seed + len(self.numbers.get("evaded", ())))
        return evading(self.backbone, self.sets.pairs, self.sets.harmless[1:], depth_of, rng, self._generator)

    def _instant_part(
        self, encoded: dict[str, dict[str, Tensor]], blocks: Sequence[str], gated: str, gate: Gate,
        constant: dict[str, Tensor],
    ) -> Part:  # fmt: skip
        recipe, moves = self.recipe, {}
        known = self.existing.parts[0].moves if self.existing else {}
        for block in blocks:
            states = {name: cut(found, block) for name, found in encoded.items() if found}
            normalised = known.get(block)
            if normalised is None or normalised.scale is None:
                normalised = gate if block == gated else None
            if normalised is not None:
                mean, scale = normalised.mean, normalised.scale
            else:
                both = [states["unsafe"], states["harmless"]]
                mean, scale = statistics(both, [judged_all(tokens, constant.get(block)) for tokens in both])
            pairs, held_out, still, held_still = (
                token_statistics(*same_length(states[source], states[target]), mean, scale, constant.get(block))
                for source, target in (("unsafe", "safe"), ("held_unsafe", "held_safe"),
                                       ("harmless", "harmless"), ("calibration", "calibration"))
            )  # fmt: skip
            self._text[block] = pairs.beside(still)
            rank = min(recipe.rank, len(mean))
            if recipe.initial == "instant":
                moves[block] = instant_move(self._text[block], held_out.beside(held_still), rank)
            elif recipe.initial == "difference":
                moves[block] = difference_move(pairs, rank, recipe.seed)
            else:
                moves[block] = zero_move(pairs, rank, recipe.seed)
        moves |= {block: move for block, move in known.items() if block in moves}
        return Part(slug(self.concept), moves, {gated: gate}, constant)

    def _instant_losses(self, states: dict[str, Tensor], gate: Gate, constant: Tensor | None) -> list[float]:
        """Two points for the curve of a region without diffusion model: unsafe prompts left, before and after."""
        touched = float((prompt_depths(states["unsafe"], gate, constant) > 0).float().mean())
        return [] if self.recipe.steps else [1.0, 1.0 - touched]

    def _discover(self, part: Part) -> None:
        recipe = self.recipe
        count = min(recipe.trajectories, len(self.sets.pairs))
        rows = torch.randperm(len(self.sets.pairs), generator=self._generator)[:count].tolist()
        prompts = [self.sets.pairs[row] for row in rows]
        unsafe, safe = (self.backbone.encode([pair[side] for pair in prompts]) for side in (0, 1))
        pairs = list(zip(unsafe, safe))
        empty = self.backbone.encode([""])[0]
        moments = collect_moments(
            self.backbone,
            pairs,
            empty,
            part,
            recipe.guidance,
            recipe.sampling_steps,
            recipe.target,
            self._generator,
            lambda done, total: self._ledger.reach("trajectories", 4 * done, message=f"{done} of {total}"),
        )
        if recipe.initial == "lora":
            shift = lora_shift(self.backbone, [a for a, _ in prompts], unsafe, moments, 4, self._generator)
            move = replace(part.moves[CROSS_ATTENTION], offset=shift)
            part = replace(part, moves=part.moves | {CROSS_ATTENTION: move})

        def visit(step: int, loss: float, current: Part) -> None:
            self.losses.append(loss)
            self._keep(current)
            self._ledger.report("discover", loss=loss, measure=self.measure,
                                message=f"step {step + 1} of {recipe.steps}")  # fmt: skip
            if recipe.previews_after(step) and self.draws() and processes.index() == 0:
                self._ledger.report("preview", preview=self._preview(self.region), message=f"after step {step + 1}")

        part = discover(self.backbone, pairs, moments, part, recipe.steps, recipe.learning_rate, recipe.batch_size,
                        self._generator, visit, self._text, recipe.text_weight)  # fmt: skip
        held_out = self.sets.held_out[:STRENGTH_PROMPTS]
        entries = list(zip(*(self.backbone.encode([pair[side] for pair in held_out]) for side in (0, 1))))
        strength = settle_strength(self.backbone, entries, part, self._generator)
        part = scaled(part, strength)
        safe = safe_share(self.backbone, entries, part, self._generator)
        self.numbers |= {"strength": strength, "drawn_safely": safe}
        self._keep(part)
        self._ledger.report("strength", message=f"{strength:.2f} of the way is enough")

    def _run_paper(self) -> None:
        recipe = self.recipe
        prompts = self.backbone.encode([unsafe for unsafe, _ in self.sets.pairs])
        concept, empty = self.backbone.encode([self.concept, ""])
        self._ledger.report("encode")
        start = self.existing.parts[0] if self.existing else paper_part(slug(self.concept), empty, self._generator)

        def visit(step: int, loss: float, part: Part) -> None:
            self.losses.append(loss)
            self._keep(part)
            self._ledger.report("discover", loss=loss, measure=self.measure,
                                message=f"trajectory {step + 1} of {recipe.steps}")  # fmt: skip

        self._keep(
            train_paper(self.backbone, prompts, concept, empty, start, recipe.steps, recipe.learning_rate,
                        recipe.guidance, recipe.sampling_steps, self._generator, visit, away=recipe.guidance)
        )  # fmt: skip

    # --- results ---

    def _keep(self, part: Part) -> None:
        digest = hashlib.sha256(self.pairs.text().encode()).hexdigest()[:16]
        metadata = {
            "name": self.concept,
            "concept": self.concept,
            "created": date.today().isoformat(),
            "encoder": self.backbone.signature(),
            "recipe": self.recipe.describe() | {"pairs": len(self.pairs.pairs), "pairs_hash": digest},
            "calibration": self.numbers.get("calibration", {}),
        }
        self.region = Region((detached(part),), metadata | self._so_far())

    def preview_prompts(self) -> list[str]:
        """Unsafe ones, not learned from where there are enough."""
        chosen = self.sets.held_out or self.sets.pairs
        return [unsafe for unsafe, _ in chosen[:PREVIEW_PROMPTS]]

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        return [*self.preview_prompts(), *self.sets.calibration[:2]]

    def _preview(self, region: Region) -> Image.Image:
        entries = self.backbone.encode(self.preview_prompts())
        return report.mosaic([self._before[: len(entries)], self._draw(apply_to_conditioning(entries, region))])

    def _draw_before_after(self, region: Region) -> list[tuple[str, Image.Image, Image.Image]]:
        prompts = self.shown_prompts()
        after = self._draw(apply_to_conditioning(self.backbone.encode(prompts), region))
        unsafe = len(self.preview_prompts())
        captions = [prompt if i < unsafe else f"harmless: {prompt}" for i, prompt in enumerate(prompts)]
        return list(zip(captions, self._before, after))

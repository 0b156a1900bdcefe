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
from ..region.blocks import key_of
from ..region.conditioning import CROSS_ATTENTION, apply_to_conditioning
from ..region.files import slug
from ..region.region import Gate, Move, Part, Region, Scope
from . import processes
from .discovery import TRAJECTORY_BATCH, collect_moments, discover, safe_share, scaled, settle_strength
from .gate import STEPS as GATE_STEPS
from .gate import TOLD_EVERY, checked_card, judged_all, of_new_words, statistics, touched_share
from .going_on import SEEN, check_existing, extended_move, seen_by_old
from .hardening import evading
from .instant import TokenStatistics, difference_move, instant_move, token_statistics, zero_move
from .lora import lora_shift
from .pairs import PairsError, PromptPairs
from .paper_recipe import paper_part, train_paper
from .plan import Work, region_work
from .previews import mosaic
from .progress import UNSAFE_LEFT, WALLS
from .prompts import PromptSets, build_sets, with_new_words
from .recipe import INITIAL, PREVIEW_PROMPTS, STRENGTH_PROMPTS, TARGETS, Recipe
from .run import TrainingRun, detached
from .scope import beyond_scope, fit_scope
from .text_states import Source, batches, beside, blocks_of, cut, few, known_tokens, same_length, sources_of, stacked
from .walls import Encoded, Walls, alike, calibrated, fit_walls, gate_depths, kept_apart, known_walls


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
            existing: a region to go on from. Its walls stay, with new ones beside them for the pairs; the move is
                learned from the pairs and from what the old one did.

        Raises PairsError or ValueError (RegionError for the region) when the input cannot be trained on.
        """  # fmt: skip
        super().__init__(backbone, recipe, concept.strip() or pairs.title or "unsafe content", UNSAFE_LEFT)
        self.pairs = pairs
        self.existing = existing
        self._text: dict[str, TokenStatistics] = {}  # by block
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

    def work(self) -> Work:
        """What the run has to do."""
        return region_work(self)

    # --- stages ---

    def count_steps(self) -> dict[str, int]:
        """Of each stage, in about the order in which they come."""
        sets, recipe = self.sets, self.recipe
        drawn = int(self.draws())
        if recipe.preset == "paper":
            return {"encode": 1, "discover": recipe.steps, "report": drawn}
        encoding = sum(batches(len(prompts)) for prompts in [*self.prompts().values(), *self.tried()])
        moments = -(-min(recipe.trajectories, len(sets.pairs)) // TRAJECTORY_BATCH) * 4 if recipe.steps else 0
        harden = recipe.harden if self._searches() else 0
        gate = GATE_STEPS // TOLD_EVERY * (1 + harden)
        return {
            "encode": encoding, "gate": gate, "calibrate": 1 + harden, "harden": 4 * harden, "instant": 1,
            "trajectories": moments, "discover": recipe.steps, "preview": recipe.previews() * drawn,
            "strength": int(recipe.steps > 0), "report": drawn,
        }  # fmt: skip

    def _searches(self) -> bool:
        """Whether prompts that evade the walls can be searched for."""
        return self.backbone.can_denoise

    def _run_region(self) -> None:
        recipe, lists = self.recipe, self.prompts(crowds=False)
        encoded = {name: self._encode(prompts) for name, prompts in self.prompts().items()}
        taught = (encoded[name] for name in ("unsafe", "safe", "harmless"))
        sources = [one for one in sources_of(*taught) if not alike(one, encoded)]
        if not sources:
            raise PairsError("This text encoder reads both sides of every pair alike: is its model loaded and whole?")
        known = known_walls(self.existing.parts[0]) if self.existing else []
        judged_blocks = [one.block for one in (*sources, *(walls.source for walls in known))]
        keys = dict.fromkeys(map(key_of, judged_blocks))
        states = {name: {key: found[key] for key in keys if key in found} for name, found in encoded.items()}
        # crowds are for the walls only
        encoded = {name: {key: tokens[: len(lists[name])] for key, tokens in found.items()}
                   for name, found in encoded.items() if name != "long"}  # fmt: skip
        blocks = blocks_of(*(encoded[name] for name in encoded if lists[name]))
        constant = known_tokens(encoded["harmless"], encoded["unsafe"], [*judged_blocks, *blocks])
        if known and self._seen_by(known, states, constant) >= SEEN:
            sources = []
        gates = self._fit_gates(states, sources, known, constant)
        for number in range(recipe.harden if self._searches() else 0):
            found = self._evading(gates, constant)
            self._ledger.report("harden", 4, message=f"round {number + 1}: {len(found)} prompts evaded the gate")
            self.numbers.setdefault("evaded", []).append(len(found))
            if not found:
                break
            # for the walls only: odd forms among the move's prompts made it weaker on all the others
            for name, side in (("unsafe", 0), ("safe", 1)):
                more = self._encode([pair[side] for pair in found], False)
                states[name] = {key: beside(tokens, more[key]) for key, tokens in states[name].items() if key in more}
            gates = self._fit_gates(states, sources, known, constant)
        scopes = self._fit_scopes(states, gates, constant)
        self._measure(Part("", {}, gates, constant, scopes))
        self._ledger.close("gate", "calibrate", "harden")
        part = self._instant_part(encoded, blocks, gates, constant)
        part = processes.agreed(replace(part, scopes=scopes))
        self._keep(part)
        if not recipe.steps:  # two points for the curve of a region without diffusion model: unsafe prompts left
            self.losses += [1.0, 1.0 - self.numbers["calibration"]["unsafe_touched"]]
        self._ledger.report("instant", message="instant region ready")
        if recipe.steps:
            del encoded, states
            self._discover(part)

    def _seen_by(self, known: Sequence[Walls], states: Encoded, constant: dict[str, Tensor]) -> float:
        """On which share of the unsafe prompts walls open."""
        depths = torch.cat([torch.stack([walls.depths(states[name], constant) for walls in known]).amax(0)
                            for name in ("unsafe", "held_unsafe")])  # fmt: skip
        return touched_share(depths)

    def _fit_gates(
        self, states: Encoded, sources: Sequence[Source], known: Sequence[Walls], constant: dict[str, Tensor]
    ) -> dict[str, Gate]:
        """Gates by block: walls in each source beside those that are known, calibrated together."""
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
        gates, card, self._depths = calibrated(walls, known, states, constant, self.recipe.budget)
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self._told_apart(*self._depths),
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip
        return gates

    def _fit_scopes(self, states: Encoded, gates: dict[str, Gate], constant: dict[str, Tensor]) -> dict[str, Scope]:
        """What prompts look like in each block that has a gate."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        found = {block: fit_scope(cut(states["harmless"], block), cut(states["calibration"], block),
                                  cut(states["harmless"], block)[:1], constant.get(block), generator)
                 for block in gates if key_of(block) in states["calibration"]}  # fmt: skip
        return {block: scope for block, scope in found.items() if scope}

    def _measure(self, part: Part) -> None:
        """What gates and scopes do to prompts that chose nothing."""

        def depths(prompts: Sequence[str]) -> Tensor:
            encoded = self._encode(prompts)
            walls = gate_depths(encoded, part.gates, part.constant)
            return torch.where(beyond_scope(encoded, part), walls.clamp(min=1e-6), walls)

        if self.new_words:
            self.numbers["calibration"] |= of_new_words(depths(self.new_words))
        found = {kind: depths(prompts) for kind, prompts in self.checked.items() if prompts}
        self.numbers["calibration"] |= checked_card(found)

    def _evading(self, gates: dict[str, Gate], constant: dict[str, Tensor]) -> list[tuple[str, str]]:
        """Unsafe prompts, and their safe counterparts, that the gates do not see."""

        def depth_of(prompts: Sequence[str]) -> Tensor:
            return gate_depths(stacked(self.backbone.encode(prompts)), gates, constant)

        rng = Random(self.recipe.seed + len(self.numbers.get("evaded", ())))
        return evading(self.backbone, self.sets.pairs, self.sets.harmless[1:], depth_of, rng, self._generator)

    def _instant_part(
        self, encoded: Encoded, blocks: Sequence[str], gates: dict[str, Gate], constant: dict[str, Tensor]
    ) -> Part:  # fmt: skip
        recipe, old = self.recipe, self.existing.parts[0] if self.existing else None
        moves = dict(old.moves) if old else {}
        if old:  # what its walls open on is to be moved, whoever calls it harmless
            shut = {name: gate_depths(encoded[name], old.gates, constant) <= 0 for name in ("harmless", "calibration")}
            encoded = {**encoded, **{name: {key: states[rows] for key, states in encoded[name].items()}
                                     for name, rows in shut.items()}}  # fmt: skip
        for block in blocks:
            states = {name: cut(found, block) for name, found in encoded.items() if found}
            known = old.moves.get(block) if old else None
            mean, scale = self._normalised(block, known, gates, states, constant)
            pairs, held_out, still, held_still = (
                token_statistics(*same_length(states[source], states[target]), mean, scale, constant.get(block))
                for source, target in (("unsafe", "safe"), ("held_unsafe", "held_safe"),
                                       ("harmless", "harmless"), ("calibration", "calibration"))
            )  # fmt: skip
            if known:
                kept = seen_by_old(known, still)
                pairs, held_out = pairs.beside(kept, 1.0), held_out.beside(kept, 1.0)
            self._text[block] = pairs.beside(still)
            rank = min(recipe.rank, len(mean))
            if known:
                moves[block] = extended_move(known, self._text[block], held_out.beside(held_still), rank)
            elif recipe.initial == "instant":
                moves[block] = instant_move(self._text[block], held_out.beside(held_still), rank)
            elif recipe.initial == "difference":
                moves[block] = difference_move(pairs, rank, recipe.seed)
            else:
                moves[block] = zero_move(pairs, rank, recipe.seed)
        return Part(slug(self.concept), moves, gates, constant)

    def _normalised(
        self, block: str, known: Move | None, gates: dict[str, Gate], states: dict[str, Tensor],
        constant: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mean and scale [D] for a block's move: those that it has, those of a gate, or those of the states."""
        gate = gates.get(block)
        if known is not None and known.mean is not None and known.scale is not None:
            return known.mean, known.scale
        if gate is not None and bool((gate.weight != 0).all()):  # it looks at every feature
            return gate.mean, gate.scale
        both = [states["unsafe"], states["harmless"]]
        return statistics(both, [judged_all(tokens, constant.get(block)) for tokens in both])

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
        # an old concept is not to fade a little each time
        strength = 1.0 if self.existing else settle_strength(self.backbone, entries, part, self._generator)
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
        if self.existing:
            metadata["continued_from"] = {"name": self.existing.name, "hash": self.existing.parts[0].id}
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
        return mosaic([self._before[: len(entries)], self._draw(apply_to_conditioning(entries, region))])

    def _draw_before_after(self, region: Region) -> list[tuple[str, Image.Image, Image.Image]]:
        prompts = self.shown_prompts()
        after = self._draw(apply_to_conditioning(self.backbone.encode(prompts), region))
        unsafe = len(self.preview_prompts())
        captions = [prompt if i < unsafe else f"harmless: {prompt}" for i, prompt in enumerate(prompts)]
        return list(zip(captions, self._before, after))

"""Learning an attribute region: a gate for prompts that leave the attribute open, one for those that state it, and a
move for each group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.balance import STATED, balance_conditioning
from ..region.conditioning import Entry, text_blocks, with_blocks
from ..region.region import Gate, Move, Part, Region
from .attributes import AttributePairs, Share, build_shares
from .gate import (
    RISK,
    SPARE,
    TOLD_EVERY,
    checked_card,
    fit_gate,
    joined,
    of_new_words,
    prompt_depths,
    tolerance_limit,
    touched_share,
)
from .gate import STEPS as GATE_STEPS
from .learner import Learner, Taught
from .pairs import PairsError
from .progress import GROUP_LEFT, WALLS
from .recipe import PREVIEW_PROMPTS, Recipe
from .stages import Stage
from .text_states import Source, blocks_of, few, gated_key, known_tokens
from .walls import Walls, alike, calibrated

CONTRAST = 1.0  # see `set_apart`
STATED_STEPS = 1_000  # of the walls where the attribute is stated: an open prompt and its counterpart lie close


def set_apart(states: Sequence[Tensor], group: int, contrast: float) -> Tensor:
    """Text states of one group's counterparts, `c_g + contrast (c_g - mean of the other groups' c)`.

    Where a model hardly heeds the word for a group, its counterpart alone is a poor goal: this goes further the same
    way. All states [..., T, D] are of the same shape.
    """
    others = [tensor for i, tensor in enumerate(states) if i != group]
    return states[group] + contrast * (states[group] - sum(others) / len(others))


def calibrate_stated(gate: Gate, told: Tensor, free: Tensor, budget: float) -> tuple[Gate, float]:
    """Move the walls until no more than `budget` of prompts that state the attribute stay inside, but with chance RISK.

    Where prompts that leave it open lie further in, part of the room between goes to prompts unlike those seen. Where
    more than half of them would be taken for stated, the text encoder hardly tells one from the other: then the walls
    stand where both errors are equal.

    Args:
        told: depths of independent held-out prompts that state it [N].
        free: depths of held-out prompts that leave it open [M].

    Returns the gate and the bound on the share of prompts that state the attribute and stay inside.
    """
    limit, bound = tolerance_limit(-told, budget)
    threshold = -limit
    if touched_share(free - threshold) > 0.5:
        levels = torch.cat([told, free]).sort().values
        missed = torch.searchsorted(told.sort().values, levels) / len(told)
        taken = 1 - torch.searchsorted(free.sort().values, levels) / len(free)
        threshold = float(levels[(missed - taken).abs().argmin()])
        # both kinds of prompts chose it, so its bound must hold wherever it stands (Massart, 1990)
        bound = min(touched_share(threshold - told) + math.sqrt(math.log(1 / RISK) / (2 * len(told))), 1.0)
    threshold -= SPARE * max(threshold - float(free.quantile(0.95)), 0.0)
    return replace(gate, bias=gate.bias + threshold), bound


class AttributeTrainer(Learner):
    """A run that learns an attribute region from rows."""

    kinds = ("other", "open")

    def __init__(
        self, backbone: Backbone, pairs: AttributePairs, recipe: Recipe | None = None, contrast: float = CONTRAST
    ) -> None:
        """`contrast`: see `set_apart`. Raises ValueError when the recipe needs a model that is not there."""
        super().__init__(backbone, recipe, pairs.attribute, GROUP_LEFT)
        self.pairs, self.contrast = pairs, contrast
        self.numbers["attribute"] = pairs.attribute
        self._stated: Part | None = None

    # --- what it will take ---

    def _example(self) -> str:
        return self.pairs.rows[0][0] if self.pairs.rows else ""

    @cached_property
    def _shares(self) -> tuple[Share, Share, Share]:
        return build_shares(self.pairs, self.recipe.seed, self._most)

    @property
    def learn(self) -> Share:
        return self._shares[0]

    @property
    def held_out(self) -> Share:
        return self._shares[1]

    def prompts(self) -> list[list]:
        """The prompts, and rows for their open prompts, whose text states are kept."""
        held = self.held_out
        kept = [prompts for share in (self.learn, held) for prompts in (share.rows, share.plain, share.stated)]
        return [*kept, held.long]

    @property
    def checked(self) -> dict[str, list[str]]:
        """Prompts to leave alone that choose nothing, by kind."""
        share, own = self._shares[2], set(self.pairs.keep)
        return {
            "everyday": [prompt for prompt in share.plain if prompt not in own], "variations": share.varied,
            "long": share.long, "own": [prompt for prompt in share.plain if prompt in own], "stated": share.stated,
        }  # fmt: skip

    def tried(self) -> list[list[str]]:
        """Prompts that only measure."""
        return [self.new_words, *self.checked.values()]

    @property
    def new_words(self) -> list[str]:
        """Open prompts about subjects that it does not learn from."""
        return [neutral for neutral, _ in self.pairs.held_out]

    def walled_texts(self, states: dict[str, Tensor]) -> list[Tensor]:
        return [states[gated_key(states)]]

    # --- stages ---

    def _region_stages(self) -> list[Stage]:
        told = -(-len(self.learn.stated) // len(self.learn.rows))
        return [
            self._reading(self.prompts(), self._read_prompts, keep=True),
            Stage("gate", (GATE_STEPS + told * STATED_STEPS) // TOLD_EVERY, self._fit_walls),
            Stage("calibrate", 1),
            self._reading(self.tried(), self._check, keep=False),
            Stage("instant", 1, self._move_at_once),
            *self._discovery_stages(len(self.learn.rows)),
        ]

    def _read_prompts(self) -> None:
        """Encode all that is learned from and calibrated with."""
        self._learned, self._held = (
            {"rows": self._encode([n for n, _ in share.rows]), "plain": self._encode(share.plain),
             "stated": self._encode(share.stated)}
            for share in (self.learn, self.held_out)
        )  # fmt: skip
        self._gated = gated_key(self._learned["rows"])
        rows, stated = (self._learned[name] for name in ("rows", "stated"))
        sides = [{"unsafe": rows, "safe": {key: found.split(len(self.learn.rows))[i] for key, found in stated.items()}}
                 for i in range(len(self.targets))]  # fmt: skip
        if all(alike(Source(self._gated), both) for both in sides):
            raise PairsError("This text encoder reads all prompts of every row alike: is its model loaded and whole?")
        self._blocks = blocks_of(*self._learned.values(), *self._held.values())
        self._constant = known_tokens(self._learned["plain"], self._learned["rows"], [self._gated, *self._blocks])
        self._long = self._encode(self.held_out.long)[self._gated]

    def _move_at_once(self) -> None:
        """The instant region."""
        count, gates = len(self.targets), {self._gated: self._gate}

        def taught(half: dict[str, dict[str, Tensor]]) -> Taught:
            rows, stated = half["rows"], half["stated"]

            def goals(group: int) -> dict[str, Tensor]:
                return {key: set_apart(stated[key].split(len(tokens))[:count], group, self.contrast)
                        for key, tokens in rows.items() if key in stated}  # fmt: skip

            return Taught(rows, goals, half["plain"])

        moves = self._first_moves(taught(self._learned), taught(self._held), self._blocks, gates, self._constant)
        del self._learned, self._held, self._long  # they are large, and nothing reads them any more
        nothing = {self._gated: Move(offset=torch.zeros_like(self._gate.mean))}
        known = {block: tokens for block, tokens in self._constant.items() if block == self._gated}
        self._stated = Part(STATED, nothing, {self._gated: self._stated_gate}, known)
        self._start_with([Part(group, of_group, gates, self._constant) for group, of_group in zip(self.targets, moves)])

    def _margins(self, tokens: Tensor) -> Tensor:
        """How far prompts [N, T, D] are from both gates' walls, positive where they are touched: [N]."""
        known = self._constant.get(self._gated)
        return torch.minimum(prompt_depths(tokens, self._gate, known), -prompt_depths(tokens, self._stated_gate, known))

    def _check(self) -> None:
        """What both gates do to prompts that chose nothing."""
        if self.new_words:
            self.numbers["calibration"] |= of_new_words(self._margins(self._encode(self.new_words)[self._gated]))
        found = {kind: self._margins(self._encode(prompts)[self._gated]) for kind, prompts in self.checked.items()
                 if prompts}  # fmt: skip
        self.numbers["calibration"] |= checked_card(found)

    def _fit_walls(self) -> None:
        """The gate that opens on what the rows are about, and the one that opens where the attribute is stated."""
        gated, known = self._gated, self._constant.get(self._gated)
        learn, held = ({name: states[gated] for name, states in half.items()} for half in (self._learned, self._held))

        def visit(step: int, loss: float, now: Gate) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                some = (prompt_depths(few(held[name]), now, known) for name in ("plain", "rows"))
                self._ledger.report("gate", loss=loss, measure=WALLS, separation=self._told_apart(*some),
                                    message="finding the walls")  # fmt: skip

        def visit_stated(step: int, loss: float, now: Gate) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                self._ledger.report("gate", loss=loss, measure=WALLS, message="finding what states the attribute")

        def like(tokens: Tensor, others: Tensor) -> Tensor:
            """`others` over again, as many as `tokens`."""
            return others[torch.arange(len(tokens)) % len(others)]

        budget = self.recipe.budget
        beside = like(learn["rows"], learn["plain"])
        gate = fit_gate(learn["rows"], beside, learn["plain"], known, self._generator, visit)
        constant = {} if known is None else {gated: known}
        sets = {"harmless": learn["plain"], "unsafe": learn["rows"], "calibration": held["plain"],
                "long": self._long, "held_unsafe": held["rows"]}  # fmt: skip
        gates, card, _ = calibrated([Walls(Source(gated), gate)], [], {name: {gated: tokens} for name, tokens in
                                                                   sets.items()}, constant, budget)  # fmt: skip
        gate = gates[gated]
        # each group has walls of its own: one that stands out would take them all
        opened, held_open = (half["rows"][: len(half["rows"]) // 2] for half in (learn, held))  # without variations
        told = learn["stated"].split(len(learn["rows"]))
        told = [*(tokens[: len(opened)] for tokens in told[: len(self.pairs.groups)]), *told[len(self.pairs.groups) :]]
        fits = [fit_gate(tokens, like(tokens, opened), opened, known, self._generator, visit_stated, STATED_STEPS)
                for tokens in told]  # fmt: skip
        walls = joined(fits)
        depths = prompt_depths(held["stated"], walls, known)
        # a row is one prompt, whatever its groups and its variation are
        count, of_rows = len(self.pairs.groups), len(self.pairs.groups) * len(held["rows"])
        told = torch.cat([depths[:of_rows].view(2 * count, -1).amin(0), depths[of_rows:]])
        stated, missed = calibrate_stated(walls, told, prompt_depths(held_open, walls, known), budget)
        self._gate, self._stated_gate = gate, stated
        self._depths = (torch.cat([*map(self._margins, (held["plain"], self._long, held["stated"]))]),
                        self._margins(held["rows"]))  # fmt: skip
        card |= {
            "harmless_prompts": len(held["plain"]) + len(told), "bound": max(card["bound"], missed),
            "confidence": 1 - 2 * RISK,  # two bounds hold at once
            "unsafe_touched": touched_share(self._margins(learn["rows"])),
            "held_out_unsafe_touched": touched_share(self._depths[1]),
        }  # fmt: skip
        del card["sources"]  # one text tells what a prompt is about
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self.separation,
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip

    # --- what is learned ---

    @property
    def targets(self) -> Sequence[str]:
        return self.pairs.groups

    def _rows(self) -> Sequence[tuple[str, Sequence[str]]]:
        return self.learn.rows

    def _goals(self, sides: Sequence[Sequence[Entry]], target: int) -> Sequence[Entry]:
        """Counterparts of one group, set apart from those of the others where they are as long."""
        goals = []
        for counterparts in zip(*sides):
            blocks = [text_blocks(entry) for entry in counterparts]
            goal = {name: set_apart([found[name] for found in blocks], target, self.contrast)
                    for name, tensor in blocks[target].items()
                    if all(found[name].shape == tensor.shape for found in blocks)}  # fmt: skip
            goals.append(with_blocks(counterparts[target], goal))
        return goals

    def _paper_prompts(self) -> list[str]:
        return [neutral for neutral, _ in self.learn.rows[: max(self.recipe.steps, 1)]]

    def _paper_goals(self) -> list[str]:
        return [f"a {group}" for group in self.targets]

    def _away(self) -> float:
        return 0.0

    def _learned_from(self) -> tuple[str, dict[str, Any]]:
        return self.pairs.text(), {"contrast": self.contrast, "rows": len(self.pairs.rows)}

    def _metadata(self) -> dict[str, Any]:
        shares = {group: 1 / len(self.targets) for group in self.targets}
        return {"attribute": self.pairs.attribute, "shares": shares}

    def _other_parts(self) -> Sequence[Part]:
        return () if self._stated is None else (self._stated,)

    def preview_prompts(self) -> list[str]:
        """Open ones, not learned from."""
        return [neutral for neutral, _ in self.held_out.rows[:PREVIEW_PROMPTS]]

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        return [*self.preview_prompts(), self.held_out.stated[0], self.held_out.plain[0]]

    def _moved(self, entries: Sequence[Entry], region: Region, target: int) -> list[Entry]:
        group = self.targets[target]
        return [balance_conditioning([entry], region, 1, 0, groups=[group])[0] for entry in entries]

    def _caption(self, prompt: str, target: int, opened: bool) -> str:
        return f"{self.targets[target]}: {prompt}"

"""Learning an attribute region: a gate for prompts that leave the attribute open, one for those that state it, and a
move for each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.balance import STATED, balance_conditioning
from ..region.conditioning import Entry, text_blocks, with_blocks
from ..region.region import Gate, Move, Part, Region
from . import processes
from .attributes import AttributePairs, Share, build_shares
from .gate import (
    RENEWED,
    RISK,
    SPARE,
    TOLD_EVERY,
    checked_card,
    joined,
    of_new_words,
    tolerance_limit,
    touched_share,
)
from .gate import STEPS as GATE_STEPS
from .learner import SHOWN, Half, Learner
from .pairs import PairsError
from .progress import GROUP_LEFT, WALLS
from .recipe import PREVIEW_PROMPTS, Recipe
from .stages import Stage
from .stream import Batch
from .text_states import Source, blocks_of, gated_key, known_tokens
from .walls import SourceFit, Walls, alike, calibrated, depths_of

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


def between(depths: Tensor) -> Tensor:
    """How far prompts are from both gates' walls [2, N], positive where they are touched: beyond those of the first
    gate and on this side of the second one's. [N]"""
    return torch.minimum(depths[0], -depths[1])


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

    def _taught_prompts(self) -> list[str]:
        return [neutral for neutral, _ in self.pairs.rows]

    @cached_property
    def _shares(self) -> tuple[Share, Share, Share]:
        return build_shares(self.pairs, self.recipe.seed, self.recipe.prompts)

    @property
    def learn(self) -> Share:
        return self._shares[0]

    @property
    def held_out(self) -> Share:
        return self._shares[1]

    def _sides(self, share: Share) -> list[list[str]]:
        """The open prompts of a share, and beside them those of each group."""
        return [[neutral for neutral, _ in share.rows],
                *([prompts[i] for _, prompts in share.rows] for i in range(len(self.targets)))]  # fmt: skip

    def _stated_otherwise(self, share: Share) -> list[str]:
        """Prompts that state the attribute, but for the counterparts of rows."""
        return share.stated[len(self.targets) * len(share.rows) :]

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

    def count_prompts(self) -> int:
        shares = (self.learn, self.held_out)
        learned = sum(len(share.rows) + len(share.plain) + len(share.stated) for share in shares)
        return learned + len(self.held_out.long) + sum(map(len, self.tried()))

    def _bagged(self) -> int:
        rows = len(self.learn.rows)
        return rows + len(self.learn.plain) + len(self.learn.stated) + rows // 2 * (len(self.targets) + 1)

    def walled_texts(self, states: dict[str, Tensor]) -> list[Tensor]:
        return [states[gated_key(states)]]

    # --- stages ---

    def _region_stages(self) -> list[Stage]:
        learn, held = self.learn, self.held_out
        kinds = len(self.targets) + bool(self._stated_otherwise(learn))
        told = (GATE_STEPS + kinds * STATED_STEPS) // TOLD_EVERY
        first = (RENEWED + kinds * RENEWED * STATED_STEPS // GATE_STEPS) // TOLD_EVERY

        def all_of(share: Share) -> list[Sequence[str]]:
            return [*self._sides(share), share.plain, *filter(None, [self._stated_otherwise(share)])]

        return [
            self._reading([*map(self._some, all_of(learn)), *(self._some(prompts, SHOWN) for prompts in
                                                              self._shown_sets())], self._look),
            self._reading(all_of(learn), self._learn_from_all),
            Stage("gate", first, lambda: self._find_walls(RENEWED / GATE_STEPS)),
            *([self._reading(all_of(learn), self._renew)] if self._renews else ()),
            Stage("gate", told - first, lambda: self._find_walls(1.0)),
            self._reading([*all_of(held), held.long, self._sides(learn)[0]], self._judge_all),
            Stage("calibrate", 1, self._calibrate),
            self._reading(self.tried(), self._check),
            Stage("instant", 1, self._move_at_once),
            self._turns_stage(*self._halves),
            *self._discovery_stages(len(learn.rows)),
        ]

    @cached_property
    def _halves(self) -> tuple[Half, ...]:
        shares = [(self._sides(share), share.plain) for share in (self.learn, self.held_out)]
        return tuple(Half(opened, goals, plain) for (opened, *goals), plain in shares)

    def _shown_sets(self) -> list[Sequence[str]]:
        """Prompts about something else, and open ones, whose depths are shown while walls are found."""
        return [self.held_out.plain, self._sides(self.held_out)[0]]

    def _look(self) -> None:
        """See by samples which texts there are, how large their features are, and where walls may begin."""
        rows, *told = (self._sample(prompts) for prompts in self._sides(self.learn))
        plain = self._sample(self.learn.plain)
        others = [self._sample(prompts) for prompts in filter(None, [self._stated_otherwise(self.learn)])]
        self._shown = [self._sample(prompts, SHOWN) for prompts in self._shown_sets()]
        self._gated = gated_key(rows)
        source, blocks = Source(self._gated), blocks_of(rows, plain, *told, *self._shown)
        if all(alike(source, {"unsafe": rows, "safe": found}) for found in told):
            raise PairsError("This text encoder reads all prompts of every row alike: is its model loaded and whole?")
        self._constant = known_tokens(plain, rows, [self._gated, *blocks])

        def fit(opened: dict[str, Tensor], shut: dict[str, Tensor], steps: int) -> SourceFit:
            """Walls that open on some prompts and not on others."""
            like = {key: states[torch.arange(len(next(iter(opened.values())))) % len(states)]
                    for key, states in shut.items()}  # fmt: skip
            return SourceFit(source, {"unsafe": opened, "safe": like, "harmless": shut}, self._constant,
                             self._generator, self._room, steps)  # fmt: skip

        self._open = fit(rows, plain, GATE_STEPS)
        # each group has walls of its own: one that stands out would take them all
        self._told = [fit(found, rows, STATED_STEPS) for found in (*told, *others)]
        self._begin_moments(blocks, self._gated, [self._open], rows, plain)

    def _goal_states(self, sides: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
        return [{key: set_apart([side[key] for side in sides], group, self.contrast) for key in sides[group]}
                for group in range(len(sides))]  # fmt: skip

    def _learn_from_all(self) -> None:
        """Read what is learned from: tokens for all walls, and averages for the moves."""
        moments = self._begun[0]

        def of_rows(batch: Batch) -> None:
            opened, *told = batch.sides
            moments.add_moved(opened, self._goal_states(told), batch.number)

        self._collect_tokens(of_rows, lambda batch: moments.add_still(batch.states, batch.number))

    def _renew(self) -> None:
        """Collect the tokens that are deepest by now."""
        self._collect_tokens()

    def _collect_tokens(
        self, of_rows: Callable[[Batch], None] = lambda batch: None,
        of_plain: Callable[[Batch], None] = lambda batch: None,
    ) -> None:  # fmt: skip
        """For all walls; rows and prompts about something else are shown to others, too."""
        share = self.learn
        varied_from = len(share.rows) // 2  # without variations the walls of what is stated lie closer
        for batch in self._read(*self._sides(share)):
            opened, *told = batch.sides
            self._open.collect("unsafe", opened, batch.number)
            plain = slice(max(varied_from - batch.rows.start, 0))
            for i, fit in enumerate(self._told):
                fit.collect("harmless", {key: states[plain] for key, states in opened.items()}, batch.number)
                if i < len(told):
                    fit.collect("unsafe", {key: states[plain] for key, states in told[i].items()}, batch.number)
            of_rows(batch)
        for batch in self._read(share.plain):
            self._open.collect("harmless", batch.states, batch.number)
            of_plain(batch)
        for batch in self._read(self._stated_otherwise(share)):
            self._told[-1].collect("unsafe", batch.states, batch.number)

    def _find_walls(self, until: float) -> None:
        """The gate that opens on what the rows are about, and the one that opens where the attribute is stated, until
        that share of the steps is done."""

        def visit(step: int, loss: float, now: Walls) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                some = (now.depths(states, self._constant) for states in self._shown)
                self._ledger.report("gate", loss=loss, measure=WALLS, separation=self._told_apart(*some),
                                    message="finding the walls")  # fmt: skip

        def visit_stated(step: int, loss: float, now: Walls) -> None:
            if step % TOLD_EVERY == TOLD_EVERY - 1:
                self._ledger.report("gate", loss=loss, measure=WALLS, message="finding what states the attribute")

        self._open.run(round(until * GATE_STEPS), visit)
        for fit in self._told:
            fit.run(round(until * STATED_STEPS), visit_stated)
        self._gate, self._stated_gate = self._open.walls[0].gate, joined([fit.walls[0].gate for fit in self._told])

    def _both(self, states: dict[str, Tensor]) -> Tensor:
        """How deep stacked prompts lie beyond the walls of either gate: [2, N]."""
        walls = [Walls(Source(self._gated), gate) for gate in (self._gate, self._stated_gate)]
        return depths_of(walls, states, self._constant)

    def _judge_all(self) -> None:
        """Read what the walls are calibrated by, and what the moves are chosen by."""
        moments, share, told = self._begun[1], self.held_out, []

        def of_rows(batch: Batch) -> None:
            opened, *goals = batch.sides
            moments.add_moved(opened, self._goal_states(goals), batch.number)
            told.append((batch.number, torch.stack([self._both(states) for states in goals], 1)))

        def of_plain(batch: Batch) -> None:
            moments.add_still(batch.states, batch.number)

        self._depth = {
            "rows": self._each(self._both, *self._sides(share), also=of_rows),
            "plain": self._each(self._both, share.plain, also=of_plain),
            "long": self._each(self._both, share.long),
            "learned": self._each(self._both, self._sides(self.learn)[0]),
        }
        self._depth["told"] = torch.cat([depths for _, depths in processes.in_order(told)], -1)  # [2, groups, rows]
        others = self._stated_otherwise(share)
        self._depth["otherwise"] = self._each(self._both, others) if others else torch.zeros(2, 0)

    def _calibrate(self) -> None:
        found, budget = self._depth, self.recipe.budget
        sets = {"unsafe": found["learned"], "calibration": found["plain"], "long": found["long"],
                "held_unsafe": found["rows"], "like": found["plain"]}  # fmt: skip
        gates, card, _ = calibrated(self._open.walls, [], {name: some[:1] for name, some in sets.items()}, budget)
        gate = gates[self._gated]
        raised = gate.bias[0] - self._gate.bias[0]
        # a row is one prompt, whatever its groups and its variation are
        told = found["told"][1].unflatten(1, (2, -1)).flatten(0, 1).amin(0)
        told = torch.cat([told, found["otherwise"][1]])
        opened = found["rows"][1][: found["rows"].shape[1] // 2]  # without variations
        stated, missed = calibrate_stated(self._stated_gate, told, opened, budget)
        raised = torch.stack([raised, stated.bias[0] - self._stated_gate.bias[0]])[:, None]
        self._gate, self._stated_gate = gate, stated
        others = torch.cat([found["plain"], found["long"], found["told"].flatten(1), found["otherwise"]], 1)
        self._depths = (between(others - raised), between(found["rows"] - raised))
        card |= {
            "harmless_prompts": found["plain"].shape[1] + len(told), "bound": max(card["bound"], missed),
            "confidence": 1 - 2 * RISK,  # two bounds hold at once
            "unsafe_touched": touched_share(between(found["learned"] - raised)),
            "held_out_unsafe_touched": touched_share(self._depths[1]),
        }  # fmt: skip
        del card["sources"]  # one text tells what a prompt is about
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self.separation,
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip

    def _check(self) -> None:
        """What both gates do to prompts that chose nothing."""

        def margins(states: dict[str, Tensor]) -> Tensor:
            return between(self._both(states))

        if self.new_words:
            self.numbers["calibration"] |= of_new_words(self._each(margins, self.new_words))
        found = {kind: self._each(margins, prompts) for kind, prompts in self.checked.items() if prompts}
        self.numbers["calibration"] |= checked_card(found)

    def _move_at_once(self) -> None:
        """The instant region."""
        del self._open, self._told  # they are large, and nothing reads them any more
        gates, moves = {self._gated: self._gate}, self._first_moves()
        del self._begun
        nothing = {self._gated: Move(offset=torch.zeros_like(self._gate.mean))}
        known = {block: tokens for block, tokens in self._constant.items() if block == self._gated}
        self._stated = Part(STATED, nothing, {self._gated: self._stated_gate}, known)
        self._start_with([Part(group, of_group, gates, self._constant) for group, of_group in zip(self.targets, moves)])

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

"""Learning an attribute region: a gate for prompts that leave the attribute open, and a move for each group.

One row a line, `open prompt => group: prompt => group: prompt`; `attribute: its name`; `stated: prompt that states the
attribute some other way`; `keep: prompt about something else`; `held-out: a row about a subject that no other has`, to
measure with; `leave-out: word` of everyday prompts that are not about something else; `# comment`. `{a|b}` lists
alternatives, which run in step in all prompts of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.balance import STATED, balance_conditioning
from ..region.conditioning import Entry, text_blocks, with_blocks
from ..region.files import slug
from ..region.region import Gate, Move, Part, Region
from . import processes
from .discovery import collect_moments, discover
from .gate import (
    RISK,
    SPARE,
    TOLD_EVERY,
    checked_card,
    fit_gate,
    joined,
    judged_all,
    of_new_words,
    prompt_depths,
    statistics,
    tolerance_limit,
    touched_share,
)
from .gate import STEPS as GATE_STEPS
from .instant import TokenStatistics, instant_move, token_statistics
from .pairs import PairsError, check_amount, everyday_prompts, expand, lines_of, read_lines
from .paper_recipe import paper_part, train_paper
from .plan import Work, attribute_work
from .previews import mosaic
from .progress import GROUP_LEFT, WALLS
from .prompts import (
    EVERYDAY_SHARES,
    MAX_KEEP,
    OWN_SHARES,
    in_a_row,
    in_three,
    vary_harmless,
    vary_pairs,
    without_named,
)
from .recipe import PREVIEW_PROMPTS, Recipe
from .run import TrainingRun, detached
from .text_states import Source, batches, blocks_of, cut, few, gated_key, known_tokens, same_length
from .walls import Walls, calibrated

CONTRAST = 1.0  # see `set_apart`
FEWEST_ROWS = 8
STATED_STEPS = 1_000  # of the walls where the attribute is stated: an open prompt and its counterpart lie close
RARE = 0.02  # of everyday prompts; a rarer word in an open prompt is taken for one that names its subject


@dataclass(frozen=True)
class AttributePairs:
    """What an attribute is learned from: `rows` of an open prompt and its counterpart for each of `groups`.

    Neither `stated` prompts, which state the attribute some other way, nor `keep`, about something else, may change.
    `held_out` rows are for measuring only. Everyday prompts with a word of `leave_out` are not taken for other things.
    """

    attribute: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    stated: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    held_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    leave_out: tuple[str, ...] = ()

    def text(self) -> str:
        """The rows in the form that `parse_attribute` reads, with all alternatives written out."""
        lines = [mark + " => ".join([neutral, *(f"{g}: {p}" for g, p in zip(self.groups, prompts))])
                 for mark, rows in (("", self.rows), ("held-out: ", self.held_out))
                 for neutral, prompts in rows]  # fmt: skip
        others = [f"{name.replace('_', '-')}: {prompt}"
                  for name in ("stated", "keep", "leave_out") for prompt in getattr(self, name)]  # fmt: skip
        return "\n".join([f"attribute: {self.attribute}", *lines, *others])


def _row(line: str) -> dict[str, list[tuple[str, str]]]:
    """(open prompt, counterpart) by group, with the alternatives of one line filled in."""
    neutral, *sides = (side.strip() for side in line.split("=>"))
    if len(sides) < 2:
        raise PairsError(f'"{line[:60]}" is no row; write: open prompt => group: prompt => group: prompt')
    found: dict[str, list[tuple[str, str]]] = {}
    letters = 0
    for side in sides:
        group, colon, prompt = (piece.strip() for piece in side.partition(":"))
        if not colon or slug(group) != group or group == STATED:
            raise PairsError(f'"{side[:60]}" names no group; write it in small letters before a colon: man: a man')
        if group in found:
            raise PairsError(f"the group {group} stands there twice")
        left, right = expand(neutral), dict(expand(prompt))
        if len(right) > 1 and set(right) != {chosen for chosen, _ in left}:
            raise PairsError(
                f"the alternatives in braces of {group} are not those of the open prompt; all need the same numbers, "
                "in the same order"
            )
        found[group] = [(text, right.get(chosen) or right.get((), "")) for chosen, text in left]
        letters += sum(len(text) + len(counterpart) for text, counterpart in found[group])
        check_amount(len(left) * len(found), letters)
        if not all(text and counterpart for text, counterpart in found[group]):
            raise PairsError("a prompt of the row is empty; write: open prompt => group: prompt => group: prompt")
    return found


def parse_attribute(text: str, source: str = "the text box") -> AttributePairs:
    """Read an attribute's rows; `source` is what errors call it. Raises PairsError with the line and the remedy."""
    attribute, groups = "", ()
    rows: dict[str, tuple[str, ...]] = {}
    held_out: dict[str, tuple[str, ...]] = {}
    others: dict[str, list[str]] = {"stated": [], "keep": [], "leave-out": []}
    count = letters = 0
    try:
        lines = lines_of(text)
    except PairsError as error:
        raise PairsError(f"{source}, {error}.") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        name, _, value = (piece.strip() for piece in line.partition(":"))
        try:
            if not line or line.startswith("#"):
                continue
            if name.lower() == "attribute":
                attribute = value
            elif name.lower() in others:
                added = [prompt for _, prompt in expand(value) if prompt]
                count, letters = count + len(added), letters + sum(map(len, added))
                others[name.lower()] += added
            else:
                apart = name.lower() == "held-out"
                found = _row(value if apart else line)
                groups = groups or tuple(sorted(found))
                if tuple(sorted(found)) != groups:
                    has, first = (", ".join(some)[:120] for some in (found, groups))
                    raise PairsError(f"this row has the groups {has}, the first one {first}")
                for filled in zip(*(found[group] for group in groups)):
                    count, letters = count + len(filled), letters + sum(len(a) + len(b) for a, b in filled)
                    (held_out if apart else rows)[filled[0][0]] = tuple(prompt for _, prompt in filled)
            check_amount(count, letters)
        except PairsError as error:
            raise PairsError(f"{source}, line {number}: {error}.") from None
    if not attribute:
        raise PairsError(f"{source}: the attribute has no name; write a line such as  attribute: gender.")
    stated, keep, leave_out = (tuple(dict.fromkeys(prompts)) for prompts in others.values())
    known = {prompt for prompts in rows.values() for prompt in prompts} | {*stated, *keep, *held_out}
    if both := known & rows.keys():
        raise PairsError(f'{source}: "{min(both)[:60]}" is an open prompt of a row and stands elsewhere too.')
    return AttributePairs(attribute, groups, tuple(rows.items()), stated, keep, tuple(held_out.items()), leave_out)


def load_attribute(path: Path | str) -> AttributePairs:
    """Read a text file of attribute rows. Raises PairsError."""
    path = Path(path)
    return parse_attribute(read_lines(path), path.name)


def demo_attribute() -> AttributePairs:
    """The demo's attribute: the gender of people at work."""
    return load_attribute(Path(__file__).parent.parent / "demo" / "gender.txt")


# --- prompt sets ---


@dataclass(frozen=True)
class Share:
    """Prompts to learn from, held out or to check with: `rows`; `plain` ones about something else; `stated` ones of a
    known group.

    `stated` begins with the counterparts of `rows`, group after group. What is not learned from has some of the plain
    prompts side by side in each of `long`; what is to check with has variations of them in `varied`.
    """

    rows: list[tuple[str, tuple[str, ...]]]
    plain: list[str]
    stated: list[str]
    varied: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)


def _words(prompt: str) -> set[str]:
    return set(prompt.lower().replace(",", " ").replace(".", " ").split())


def _subjects(pairs: AttributePairs, everyday: Sequence[str]) -> set[str]:
    """Words of the open prompts that name what they are about: not in prompts to keep, and rare in everyday ones."""
    usual = Counter(word for prompt in everyday for word in _words(prompt))
    rows = [*pairs.rows, *pairs.held_out]
    found = {word for neutral, _ in rows for word in _words(neutral) if usual[word] < RARE * len(everyday)}
    return found.difference(*map(_words, pairs.keep))


def _varied(rows: Sequence[tuple[str, tuple[str, ...]]], everyday: Sequence[str], seed: int) -> list:
    """Each row beside an everyday prompt, in upper case or with its words shuffled: all groups alike."""
    sides = [vary_pairs([(neutral, prompts[i]) for neutral, prompts in rows], everyday, [], Random(seed))
             for i in range(len(rows[0][1]))]  # fmt: skip
    return [(filled[0][0], tuple(prompt for _, prompt in filled)) for filled in zip(*sides)]


def build_shares(pairs: AttributePairs, seed: int, most: int) -> tuple[Share, Share, Share]:
    """Split and vary rows and harmless prompts: to learn from, held out to calibrate with, and to check with.

    Everyday prompts that name the subject of a row (a profession, say) are left out: what they state is not known.

    Args:
        most: roughly how many prompts may be encoded.

    Raises PairsError when there are too few rows to learn from.
    """
    if len(pairs.rows) < FEWEST_ROWS:
        raise PairsError(f"{len(pairs.rows)} rows are too few to learn from: write at least {FEWEST_ROWS}, better 50; "
                         "{a|b} makes many from one line.")  # fmt: skip
    rng = Random(seed)

    def split(items: Sequence, shares: tuple[float, float], limit: int) -> tuple[list, list, list]:
        return in_three(rng.sample(list(items), min(len(items), limit)), shares, rng)

    everyday = without_named(everyday_prompts(), [], pairs.leave_out)
    subjects = _subjects(pairs, everyday)
    group_words = {word for neutral, prompts in pairs.rows for prompt in prompts for word in _words(prompt)}
    group_words -= {word for neutral, _ in pairs.rows for word in _words(neutral)}
    rows = split(pairs.rows, (0.15, 0.0), most // (4 + 4 * len(pairs.groups)))
    stated, own = (split(prompts, OWN_SHARES, most // 8) for prompts in (pairs.stated, pairs.keep))
    daily = split([prompt for prompt in everyday if not _words(prompt) & subjects], EVERYDAY_SHARES,
                  min(most // 4, MAX_KEEP))  # fmt: skip
    shares = []
    for i in range(3):
        beside = [prompt for prompt in daily[i] if not _words(prompt) & group_words]
        found = rows[i] + _varied(rows[i], beside, rng.randrange(2**32)) if rows[i] else []
        told = [prompts[group] for group in range(len(pairs.groups)) for _, prompts in found]
        plain = list(dict.fromkeys([*own[i], *daily[i]]))
        varied, long = vary_harmless(plain, rng, pairs.leave_out), in_a_row(rng.sample(plain, len(plain)))
        if i == 0:
            plain, long = list(dict.fromkeys(["", *plain, *varied])), []
        shares.append(Share(found, plain, told + stated[i], varied, long))
    return shares[0], shares[1], shares[2]


def set_apart(states: Sequence[Tensor], group: int, contrast: float) -> Tensor:
    """Text states of one group's counterparts, `c_g + contrast (c_g - mean of the other groups' c)`.

    Where a model hardly heeds the word for a group, its counterpart alone is a poor goal: this goes further the same
    way. All states [..., T, D] are of the same shape.
    """
    others = [tensor for i, tensor in enumerate(states) if i != group]
    return states[group] + contrast * (states[group] - sum(others) / len(others))


# --- training ---


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


class AttributeTrainer(TrainingRun):
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

    def work(self) -> Work:
        """What the run has to do."""
        return attribute_work(self)

    # --- stages ---

    def count_steps(self) -> dict[str, int]:
        """Of each stage, in about the order in which they come."""
        recipe, groups = self.recipe, len(self.pairs.groups)
        drawn = int(self.draws())
        if recipe.preset == "paper":
            return {"encode": groups, "discover": groups * recipe.steps, "report": drawn}
        lists = [*self.prompts(), *self.tried()]
        encoding = sum(batches(len(prompts)) for prompts in lists)
        moments = -(-min(recipe.trajectories, len(self.learn.rows)) // 16) * 4 if recipe.steps else 0
        told = -(-len(self.learn.stated) // len(self.learn.rows))
        return {
            "encode": encoding, "gate": GATE_STEPS // TOLD_EVERY + told * (STATED_STEPS // TOLD_EVERY),
            "calibrate": 1, "instant": 1,
            "trajectories": groups * moments, "discover": groups * recipe.steps,
            "preview": groups * recipe.previews() * drawn, "report": drawn,
        }  # fmt: skip

    def _run_region(self) -> None:
        count = len(self.pairs.groups)
        learn, held = (
            {"rows": self._encode([n for n, _ in share.rows]), "plain": self._encode(share.plain),
             "stated": self._encode(share.stated)}
            for share in (self.learn, self.held_out)
        )  # fmt: skip
        gated = gated_key(learn["rows"])
        blocks = blocks_of(*learn.values(), *held.values())
        constant = known_tokens(learn["plain"], learn["rows"], [gated, *blocks])
        more = {"long": self._encode(self.held_out.long)[gated]}
        gate, stated = self._fit_gates(
            gated, {n: s[gated] for n, s in learn.items()}, {n: s[gated] for n, s in held.items()} | more,
            constant.get(gated),
        )  # fmt: skip
        text: list[dict[str, TokenStatistics]] = [{} for _ in range(count)]
        moves: list[dict[str, Move]] = [{} for _ in range(count)]
        for block in blocks:
            mean, scale = gate.mean, gate.scale
            if block != gated:
                both = [cut(learn[name], block) for name in ("rows", "plain")]
                mean, scale = statistics(both, [judged_all(tokens, constant.get(block)) for tokens in both])

            def moments(half: dict[str, dict[str, Tensor]], group: int | None, b: str = block, mean: Tensor = mean,
                        scale: Tensor = scale) -> TokenStatistics:  # fmt: skip
                """Of the open prompts and their counterparts of one group, or (None) of prompts that should stay."""
                source = target = cut(half["plain" if group is None else "rows"], b)
                if group is not None:
                    target = set_apart(cut(half["stated"], b).split(len(source))[:count], group, self.contrast)
                return token_statistics(*same_length(source, target), mean, scale, constant.get(b))

            still, held_still, rank = moments(learn, None), moments(held, None), min(self.recipe.rank, len(mean))
            for i in range(count):
                text[i][block] = moments(learn, i).beside(still)
                moves[i][block] = instant_move(text[i][block], moments(held, i).beside(held_still), rank)
        nothing = {gated: Move(offset=torch.zeros_like(gate.mean))}
        known = {block: tokens for block, tokens in constant.items() if block == gated}
        self._stated = Part(STATED, nothing, {gated: stated}, known)
        parts = processes.agreed(
            [Part(group, moves[i], {gated: gate}, constant) for i, group in enumerate(self.pairs.groups)]
        )
        self._keep(parts)
        self._ledger.report("instant", message="instant region ready")
        if self.recipe.steps:
            del learn, held
            self._discover(parts, text)
        else:
            self.losses += [1.0, 1 - self.numbers["calibration"]["unsafe_touched"]]

    def _fit_gates(
        self, gated: str, learn: dict[str, Tensor], held: dict[str, Tensor], known: Tensor | None
    ) -> tuple[Gate, Gate]:
        """The gate that opens on what the rows are about, and the one that opens where the attribute is stated."""

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
                "long": held["long"], "held_unsafe": held["rows"]}  # fmt: skip
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

        def margins(tokens: Tensor) -> Tensor:
            """How far prompts are from both gates' walls, positive where they are touched: [N]."""
            return torch.minimum(prompt_depths(tokens, gate, known), -prompt_depths(tokens, stated, known))

        self._depths = (torch.cat([margins(held[n]) for n in ("plain", "long", "stated")]),
                        margins(held["rows"]))  # fmt: skip
        card |= {
            "harmless_prompts": len(held["plain"]) + len(told), "bound": max(card["bound"], missed),
            "confidence": 1 - 2 * RISK,  # two bounds hold at once
            "unsafe_touched": touched_share(margins(learn["rows"])),
            "held_out_unsafe_touched": touched_share(self._depths[1]),
        }  # fmt: skip
        del card["sources"]  # one text tells what a prompt is about
        if self.new_words:
            card |= of_new_words(margins(self._encode(self.new_words)[gated]))
        card |= checked_card({kind: margins(self._encode(prompts)[gated]) for kind, prompts in self.checked.items()
                              if prompts})  # fmt: skip
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self._told_apart(*self._depths),
                            message=f"at most {card['bound']:.1%} of harmless prompts are touched")  # fmt: skip
        return gate, stated

    def _discover(self, parts: list[Part], text: list[dict[str, TokenStatistics]]) -> None:
        recipe = self.recipe
        count = min(recipe.trajectories, len(self.learn.rows))
        chosen = torch.randperm(len(self.learn.rows), generator=self._generator)[:count].tolist()
        rows = [self.learn.rows[row] for row in chosen]
        neutral = self.backbone.encode([prompt for prompt, _ in rows])
        sides = [self.backbone.encode([prompts[i] for _, prompts in rows]) for i in range(len(parts))]
        counterparts = list(zip(*sides))
        empty = self.backbone.encode([""])[0]
        for i, part in enumerate(parts):
            pairs = [(entry, self._goal(of_groups, i)) for entry, of_groups in zip(neutral, counterparts)]

            def tell(done: int, total: int, i: int = i, group: str = part.label) -> None:
                self._ledger.reach("trajectories", 4 * (i * total + done), message=f"{group}: {done} of {total}")

            def visit(step: int, loss: float, current: Part, i: int = i) -> None:
                self.losses.append(loss)
                parts[i] = current
                self._keep(parts)
                self._ledger.report("discover", loss=loss, measure=self.measure,
                                    message=f"{current.label}: step {step + 1} of {recipe.steps}")  # fmt: skip
                if recipe.previews_after(step) and self.draws() and processes.index() == 0:
                    self._ledger.report("preview", preview=self._preview(self.region, current.label),
                                        message=f"{current.label}: after step {step + 1}")  # fmt: skip

            moments = collect_moments(self.backbone, pairs, empty, part, recipe.guidance, recipe.sampling_steps, "pair",
                                      self._generator, tell)  # fmt: skip
            parts[i] = discover(self.backbone, pairs, moments, part, recipe.steps, recipe.learning_rate,
                                recipe.batch_size, self._generator, visit, text[i], recipe.text_weight)  # fmt: skip
            self._keep(parts)

    def _goal(self, counterparts: Sequence[Entry], group: int) -> Entry:
        """The counterpart of one group, set apart from those of the others where they are as long."""
        blocks = [text_blocks(entry) for entry in counterparts]
        goal = {name: set_apart([found[name] for found in blocks], group, self.contrast)
                for name, tensor in blocks[group].items() if all(found[name].shape == tensor.shape for found in blocks)}
        return with_blocks(counterparts[group], goal)

    def _run_paper(self) -> None:
        """The paper's way: one rank-1 shift per group for every prompt, towards the prediction for the group's name."""
        recipe = self.recipe
        empty, *names = self.backbone.encode(["", *(f"a {group}" for group in self.pairs.groups)])
        prompts = self.backbone.encode([neutral for neutral, _ in self.learn.rows[: max(recipe.steps, 1)]])
        parts: list[Part] = []
        for group, entry in zip(self.pairs.groups, names):
            self._ledger.report("encode")

            def visit(step: int, loss: float, part: Part) -> None:
                self.losses.append(loss)
                self._ledger.report("discover", loss=loss, measure=self.measure,
                                    message=f"{part.label}: trajectory {step + 1} of {recipe.steps}")  # fmt: skip

            parts.append(
                train_paper(self.backbone, prompts, entry, empty, paper_part(group, empty, self._generator),
                            recipe.steps, recipe.learning_rate, recipe.guidance, recipe.sampling_steps,
                            self._generator, visit, away=0.0)
            )  # fmt: skip
        self._keep(parts)

    def _keep(self, parts: Sequence[Part]) -> None:
        digest = hashlib.sha256(self.pairs.text().encode()).hexdigest()[:16]
        metadata = {
            "name": self.concept, "concept": self.concept, "attribute": self.pairs.attribute,
            "shares": {group: 1 / len(parts) for group in self.pairs.groups}, "created": date.today().isoformat(),
            "encoder": self.backbone.signature(),
            "recipe": self.recipe.describe()
            | {"contrast": self.contrast, "rows": len(self.pairs.rows), "pairs_hash": digest},
            "calibration": self.numbers.get("calibration", {}),
        }  # fmt: skip
        known = [part for part in (self._stated,) if part is not None]
        self.region = Region((*map(detached, parts), *known), metadata | self._so_far())

    def preview_prompts(self) -> list[str]:
        """Open ones, not learned from."""
        return [neutral for neutral, _ in self.held_out.rows[:PREVIEW_PROMPTS]]

    def shown_prompts(self) -> list[str]:
        """For the report: these, and two that should stay the same."""
        return [*self.preview_prompts(), self.held_out.stated[0], self.held_out.plain[0]]

    def _after(self, prompts: Sequence[str], region: Region, group: str) -> list[Image.Image]:
        entries = self.backbone.encode(prompts)
        return self._draw([balance_conditioning([entry], region, 1, 0, groups=[group])[0] for entry in entries])

    def _preview(self, region: Region, group: str) -> Image.Image:
        after = self._after(self.preview_prompts(), region, group)
        return mosaic([self._before[: len(after)], after])

    def _draw_before_after(self, region: Region) -> list[tuple[str, Image.Image, Image.Image]]:
        """Open prompts as they are and in each group, and two prompts that should stay the same, in the first one."""
        first, *others = self.pairs.groups
        prompts, opened = self.shown_prompts(), self.preview_prompts()
        after = {first: self._after(prompts, region, first)}
        after |= {group: self._after(opened, region, group) for group in others}
        rows = [(f"{group}: {prompt}", self._before[i], after[group][i])
                for i, prompt in enumerate(opened) for group in self.pairs.groups]  # fmt: skip
        rest = range(len(opened), len(prompts))
        return rows + [(f"{first}: {prompts[i]}", self._before[i], after[first][i]) for i in rest]

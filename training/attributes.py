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
from dataclasses import dataclass, replace
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
from . import processes, report
from .discovery import collect_moments, discover
from .gate import (
    SPARE,
    TOLD_EVERY,
    calibrate_gate,
    conformal_threshold,
    fit_gate,
    judged_all,
    prompt_depths,
    statistics,
)
from .gate import STEPS as GATE_STEPS
from .instant import TokenStatistics, instant_move, token_statistics
from .pairs import PairsError, everyday_prompts, expand
from .paper_recipe import paper_part, train_paper
from .plan import Work, attribute_work
from .progress import GROUP_LEFT, WALLS
from .prompts import MAX_KEEP, vary_harmless, vary_pairs, without_named
from .recipe import PREVIEW_PROMPTS, Recipe
from .run import TrainingRun, detached
from .text_states import (
    batches,
    blocks_of,
    cut,
    few,
    gated_key,
    known_tokens,
    same_length,
)

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
        if not all(text and counterpart for text, counterpart in found[group]):
            raise PairsError("a prompt of the row is empty; write: open prompt => group: prompt => group: prompt")
    return found


def parse_attribute(text: str, source: str = "the text box") -> AttributePairs:
    """Read an attribute's rows; `source` is what errors call it. Raises PairsError with the line and the remedy."""
    attribute, groups = "", ()
    rows: dict[str, tuple[str, ...]] = {}
    held_out: dict[str, tuple[str, ...]] = {}
    others: dict[str, list[str]] = {"stated": [], "keep": [], "leave-out": []}
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        line = line.strip()
        name, _, value = (piece.strip() for piece in line.partition(":"))
        try:
            if not line or line.startswith("#"):
                continue
            if name.lower() == "attribute":
                attribute = value
            elif name.lower() in others:
                others[name.lower()] += [prompt for _, prompt in expand(value) if prompt]
            else:
                apart = name.lower() == "held-out"
                found = _row(value if apart else line)
                groups = groups or tuple(sorted(found))
                if tuple(sorted(found)) != groups:
                    raise PairsError(f"this row has the groups {', '.join(found)}, the first one {', '.join(groups)}")
                for filled in zip(*(found[group] for group in groups)):
                    (held_out if apart else rows)[filled[0][0]] = tuple(prompt for _, prompt in filled)
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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PairsError(f"{path.name}: the file cannot be read ({reason}).") from None
    return parse_attribute(text, path.name)


def demo_attribute() -> AttributePairs:
    """The demo's attribute: the gender of people at work."""
    return load_attribute(Path(__file__).parent.parent / "demo" / "gender.txt")


# --- prompt sets ---


@dataclass(frozen=True)
class Half:
    """Prompts to learn from, or held out: `rows`; `plain` ones about something else; `stated` ones of a known group.

    `stated` begins with the counterparts of `rows`, group after group.
    """

    rows: list[tuple[str, tuple[str, ...]]]
    plain: list[str]
    stated: list[str]


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


def build_halves(pairs: AttributePairs, seed: int, most: int) -> tuple[Half, Half]:
    """Split and vary rows and harmless prompts: to learn from, and held out.

    Everyday prompts that name the subject of a row (a profession, say) are left out: what they state is not known.

    Args:
        most: roughly how many prompts may be encoded.

    Raises PairsError when there are too few rows to learn from.
    """
    if len(pairs.rows) < FEWEST_ROWS:
        raise PairsError(f"{len(pairs.rows)} rows are too few to learn from: write at least {FEWEST_ROWS}, better 50; "
                         "{a|b} makes many from one line.")  # fmt: skip
    rng = Random(seed)

    def split(items: Sequence, share: float, limit: int) -> tuple[list, list]:
        chosen = rng.sample(list(items), min(len(items), limit))
        count = round(len(chosen) * share)
        return chosen[count:], chosen[:count]

    everyday = without_named(everyday_prompts(), [], pairs.leave_out)
    subjects = _subjects(pairs, everyday)
    group_words = {word for neutral, prompts in pairs.rows for prompt in prompts for word in _words(prompt)}
    group_words -= {word for neutral, _ in pairs.rows for word in _words(neutral)}
    rows = split(pairs.rows, 0.15, most // (4 + 4 * len(pairs.groups)))
    stated, own = (split(prompts, 0.25, most // 8) for prompts in (pairs.stated, pairs.keep))
    daily = split([prompt for prompt in everyday if not _words(prompt) & subjects], 0.4, min(most // 4, MAX_KEEP))
    halves = []
    for i in range(2):
        beside = [prompt for prompt in daily[i] if not _words(prompt) & group_words]
        found = rows[i] + _varied(rows[i], beside, rng.randrange(2**32))
        told = [prompts[group] for group in range(len(pairs.groups)) for _, prompts in found]
        plain = [*own[i], *daily[i]]
        plain = list(dict.fromkeys([*([""] if i == 0 else []), *plain, *vary_harmless(plain, rng, pairs.leave_out)]))
        halves.append(Half(found, plain, told + stated[i]))
    return halves[0], halves[1]


def set_apart(states: Sequence[Tensor], group: int, contrast: float) -> Tensor:
    """Text states of one group's counterparts, `c_g + contrast (c_g - mean of the other groups' c)`.

    Where a model hardly heeds the word for a group, its counterpart alone is a poor goal: this goes further the same
    way. All states [..., T, D] are of the same shape.
    """
    others = [tensor for i, tensor in enumerate(states) if i != group]
    return states[group] + contrast * (states[group] - sum(others) / len(others))


# --- training ---


def joined(gates: Sequence[Gate]) -> Gate:
    """One gate with the walls of all, in the coordinates of the first."""
    first = gates[0]
    weights = [gate.weight * (first.scale / gate.scale) for gate in gates]
    biases = [gate.bias + (gate.weight / gate.scale) @ (gate.mean - first.mean) for gate in gates]
    return replace(first, weight=torch.cat(weights), bias=torch.cat(biases))


def calibrate_stated(
    gate: Gate, stated: Tensor, opened: Tensor, constant: Tensor | None, budget: float
) -> tuple[Gate, float]:
    """Move the walls until at most `budget` of prompts that state the attribute stay inside (split-conformal).

    Where prompts that leave it open lie further in, part of the room between goes to prompts unlike those seen. Where
    more than half of them would be taken for stated, the text encoder hardly tells one from the other: then the walls
    stand where both errors are equal.

    Args:
        stated, opened: held-out prompts [N, T, D].

    Returns the gate and the bound on the share of prompts that state the attribute and stay inside.
    """
    told, free = prompt_depths(stated, gate, constant), prompt_depths(opened, gate, constant)
    threshold = -conformal_threshold(-told, budget)
    if not math.isfinite(threshold):
        threshold = float(told.min()) - 1e-3
    if float((free > threshold).float().mean()) > 0.5:
        levels = torch.cat([told, free]).sort().values
        missed = torch.searchsorted(told.sort().values, levels) / len(told)
        taken = 1 - torch.searchsorted(free.sort().values, levels) / len(free)
        threshold = float(levels[(missed - taken).abs().argmin()])
    threshold -= SPARE * max(threshold - float(free.quantile(0.95)), 0.0)
    inside = int((told < threshold).sum())
    return replace(gate, bias=gate.bias + threshold), (inside + 1) / (len(told) + 1)


class AttributeTrainer(TrainingRun):
    """A run that learns an attribute region from rows."""

    kinds = ("other", "open")

    def __init__(
        self, backbone: Backbone, pairs: AttributePairs, recipe: Recipe | None = None, contrast: float = CONTRAST
    ) -> None:
        """`contrast`: see `set_apart`. Raises ValueError when the recipe needs a model that is not there."""
        super().__init__(backbone, recipe, pairs.attribute, GROUP_LEFT)
        self.pairs, self.contrast = pairs, contrast
        self._stated: Part | None = None

    # --- what it will take ---

    def _example(self) -> str:
        return self.pairs.rows[0][0] if self.pairs.rows else ""

    @cached_property
    def _halves(self) -> tuple[Half, Half]:
        return build_halves(self.pairs, self.recipe.seed, self._most)

    @property
    def learn(self) -> Half:
        return self._halves[0]

    @property
    def held_out(self) -> Half:
        return self._halves[1]

    def prompts(self) -> list[list]:
        """The prompts, and rows for their open prompts, whose text states are kept."""
        return [prompts for half in self._halves for prompts in (half.rows, half.plain, half.stated)]

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
        lists = [*self.prompts(), self.new_words]
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
            {"rows": self._encode([n for n, _ in half.rows]), "plain": self._encode(half.plain),
             "stated": self._encode(half.stated)}
            for half in (self.learn, self.held_out)
        )  # fmt: skip
        gated = gated_key(learn["rows"])
        blocks = blocks_of(*learn.values(), *held.values())
        constant = known_tokens(learn["plain"], learn["rows"], [gated, *blocks])
        new_words = self._encode(self.new_words)[gated] if self.new_words else None
        gate, stated = self._fit_gates(
            *({n: s[gated] for n, s in half.items()} for half in (learn, held)), new_words, constant.get(gated)
        )
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
        self, learn: dict[str, Tensor], held: dict[str, Tensor], new_words: Tensor | None, known: Tensor | None
    ) -> tuple[Gate, Gate]:  # fmt: skip
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
        gate, card = calibrate_gate(gate, held["plain"], learn["rows"], held["rows"], known, budget)
        # each group has walls of its own: one that stands out would take them all
        opened, held_open = (half["rows"][: len(half["rows"]) // 2] for half in (learn, held))  # without variations
        told = learn["stated"].split(len(learn["rows"]))
        told = [*(tokens[: len(opened)] for tokens in told[: len(self.pairs.groups)]), *told[len(self.pairs.groups) :]]
        fits = [fit_gate(tokens, like(tokens, opened), opened, known, self._generator, visit_stated, STATED_STEPS)
                for tokens in told]  # fmt: skip
        stated, missed = calibrate_stated(joined(fits), held["stated"], held_open, known, budget)

        def margins(tokens: Tensor) -> Tensor:
            """How far prompts are from both gates' walls, positive where they are touched: [N]."""
            return torch.minimum(prompt_depths(tokens, gate, known), -prompt_depths(tokens, stated, known))

        harmless = torch.cat([margins(held["plain"]), margins(held["stated"])])
        self._depths = (harmless, margins(held["rows"]))
        card |= {
            "harmless_prompts": len(harmless), "bound": max(card["bound"], missed),
            "harmless_touched": float((harmless > 0).float().mean()),
            "unsafe_touched": float((margins(learn["rows"]) > 0).float().mean()),
            "held_out_unsafe_touched": float((self._depths[1] > 0).float().mean()),
        }  # fmt: skip
        if new_words is not None:
            card |= report.of_new_words(margins(new_words))
        self.numbers["calibration"] = card
        self._ledger.report("calibrate", separation=self._told_apart(*self._depths),
                            message=f"touches {card['harmless_touched']:.1%} of harmless prompts")  # fmt: skip
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
        return report.mosaic([self._before[: len(after)], after])

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

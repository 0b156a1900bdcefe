"""Ways to balance an attribute side by side on the demo model: same prompts, noise and judge; it can be resumed.

    python benchmarks/balance.py [--images 24] [--guidance 4 1] [--quick] [--region FILE] [--out build/balance]

Writes results.json (kept up to date: run it again to go on) and balance.md (tables). The judge says what was drawn;
of the 18 names of professions six were in no training. The demo world has one attribute of people, gender; for two
attributes at once the background, where a prompt states none, stands in as the second.
"""
from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from kept import keep, load, trained
from publishing import MEASURED, as_table, put, share
from torch import Tensor

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import WEIGHTS, Judge, Verdict
from comfyui_safe_region.evaluation.baselines import (
    Conditioning,
    Method,
    debias_vl_method,
    none_method,
    uce_debias_method,
)  # fmt: skip
from comfyui_safe_region.evaluation.demo_prompts import demo_prompts
from comfyui_safe_region.region import Entry, Region, attribute_of, balance_conditioning, load_region
from comfyui_safe_region.region.balance import known_groups
from comfyui_safe_region.training.attribute_trainer import AttributeTrainer
from comfyui_safe_region.training.attributes import demo_attribute, parse_attribute
from comfyui_safe_region.training.recipe import PRESETS

SHIPPED = WEIGHTS.parent / "regions" / "demo-gender.safetensors"
GROUPS = ("man", "woman")
ADJECTIVES = {"man": "male", "woman": "female"}
BATCH, STEPS, SEED = 8, 20, 11
ONE_EACH = 40  # prompts drawn at once, where each is drawn once
PAPER_START = 0.2  # step 10 of 50
UCE_ROUNDS, UCE_IMAGES = 8, 10  # the authors: 30 and 50
WORDS = [(word, job) for job, (_, words, _) in world.PROFESSIONS.items() for word in words]
TRAINED = {word for word, _ in WORDS if any(word in prompt for prompt, _ in demo_attribute().rows)}
STATED = re.compile(r"\b(?:fe)?male\b|\b(?:wo)?man\b")


def a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


@dataclass(frozen=True)
class Way:
    """A way to balance: what a batch of one prompt becomes, and which group each image is meant to have (if any)."""

    method: Method
    plan: Callable[[str, int, int], tuple[list[Conditioning], list[str] | None]]  # prompt, images, seed


def whole(method: Method) -> Way:
    """A method that treats all images of a prompt alike."""
    return Way(method, lambda prompt, count, seed: (method.positive([prompt]) * count, None))


def worded(method: Method) -> Way:
    """As somebody would without any of this: where a prompt leaves the group open, the words say it, turn by turn."""
    names = re.compile(r"\ban? (?=(?:" + "|".join(word for word, _ in WORDS) + r")\b)")

    def plan(prompt: str, count: int, seed: int) -> tuple[list[Conditioning], list[str]]:
        groups = [GROUPS[image % 2] for image in range(count)]
        is_open = not STATED.search(prompt)
        return method.positive([names.sub(f"a {group} ", prompt) if is_open else prompt for group in groups]), groups

    return Way(method, plan)


def by_image(entries: Sequence[Entry], count: int) -> list[Conditioning]:
    """A conditioning for each image, from entries with a row for each image or one row for all."""
    return [[[text[image % len(text)][None], options] for text, options in entries] for image in range(count)]


def balanced(method: Method, regions: Sequence[Region], at_random: bool = False, **options: Any) -> Way:
    """Attribute regions, one after the other; `at_random` lets each image draw its group by itself."""

    def plan(prompt: str, count: int, seed: int) -> tuple[list[Conditioning], list[str]]:
        ((entry,),) = method.positive([prompt])
        entries: list[Entry] = [entry]
        for region in regions:
            rng, labels = Random(seed), list(attribute_of(region).groups)
            groups = [rng.choice(labels) for _ in range(count)] if at_random else None
            entries = balance_conditioning(entries, region, count, seed, groups=groups, **options)
        found = known_groups(entries, count)
        return by_image(entries, count), [" ".join(row) for row in zip(*found.values())]

    return Way(method, plan)


def gender(verdict: Verdict) -> str:
    return max(GROUPS, key=lambda group: max(verdict.things[f"{group} {job}"] for job in world.PROFESSIONS))


def profession(verdict: Verdict) -> str:
    return max(world.PROFESSIONS, key=lambda job: max(verdict.things[f"{group} {job}"] for group in GROUPS))


def draw(way: Way, conditionings: Sequence[Conditioning], guidance: float, seed: int, steps: int = STEPS) -> Tensor:
    return way.method.backbone.decode(way.method.sample(conditionings, guidance, steps, seed))


def counter(judge: Judge, guidance: float = 4.0) -> Callable[[DemoBackbone, Sequence[str]], Tensor]:
    """Counts men and women among pictures of prompts, for UCE-debias."""

    def count(edited: DemoBackbone, prompts: Sequence[str]) -> Tensor:
        way = whole(replace(none_method(edited), backbone=edited))
        shares = []
        for prompt in prompts:
            seen = [gender(v) for v in judge(draw(way, way.plan(prompt, UCE_IMAGES, 0)[0], guidance, 100, 12))]
            shares.append([seen.count(group) / len(seen) for group in GROUPS])
        print("UCE-debias", {p: f"{s[0]:.2f}" for p, s in zip(prompts, shares)}, flush=True)
        return torch.tensor(shares)

    return count


def background_region(backbone: DemoBackbone, file: Path) -> Region:
    """The second attribute: night or beach, where the prompt states no background. Trained once."""

    def train() -> Region:
        names = "|".join(a(word) for word, _ in WORDS if word in TRAINED)
        grounds = {"night": "at night", "beach": "on the beach"}
        forms = ("{NAMES}", "a photo of {NAMES}", "there is {NAMES}", "an illustration of {NAMES}", "{NAMES}, simple")
        rows = []
        for form in forms:
            opened = form.replace("NAMES", names)
            rows.append(" => ".join([opened, *(f"{name}: {opened} {said}" for name, said in grounds.items())]))
        others = "|".join(world.background_phrase(name)[0] for name in world.BACKGROUNDS)
        calm = f"keep: {{a judge|a doctor|a cook|a cat|a tree|a car}} {{{others}}}"
        pairs = parse_attribute("\n".join(["attribute: background", *rows, calm, "keep: {a cat|a dog|a tree|a car}"]))
        return AttributeTrainer(backbone, pairs, PRESETS["region"]).run()

    return trained(file, train)


class Ways:
    """Ways by name, each made when it is first asked for."""

    def __init__(self, region: Path, out: Path, judge: Judge) -> None:
        self.backbone, self.region, self.out = DemoBackbone(), cache(lambda: load_region(region)), out
        self.drawn: dict[tuple, Tensor] = {}  # what the model draws by itself
        plain = none_method(self.backbone)
        trained = [word for word, _ in WORDS if word in TRAINED]
        photos = [[f"A photo of a {ADJECTIVES[group]} {word}." for group in GROUPS] for word in trained]
        own = [f"A photo of a {group}." for group in GROUPS]
        named = [[f"{group} {word}" for group in GROUPS] for word in trained]
        self.makers: dict[str, Callable[[], Way]] = {
            "none": lambda: whole(plain),
            "said in words": lambda: worded(plain),
            "paper, random": lambda: balanced(plain, [self.paper()], at_random=True, start=PAPER_START),
            "UCE-debias": lambda: whole(uce_debias_method(
                self.backbone, [a(word) for word in trained], named, [0.5, 0.5], counter(judge), UCE_ROUNDS
            )),
            "debias_vl": lambda: whole(debias_vl_method(self.backbone, photos)),
            "debias_vl, projected": lambda: whole(debias_vl_method(self.backbone, photos, own)),
            "ours": lambda: balanced(plain, [self.region()]),
        }  # fmt: skip
        self.made: dict[str, Way] = {}

    def __getitem__(self, name: str) -> Way:
        if name not in self.made:
            self.made[name] = self.makers[name]()
        return self.made[name]

    def paper(self) -> Region:
        """A direction per group, learned the paper's way; trained once."""
        return trained(
            self.out / "paper.safetensors",
            lambda: AttributeTrainer(self.backbone, demo_attribute(), PRESETS["paper"]).run(),
        )


def people(way: Way, judge: Judge, guidance: float, images: int) -> dict[str, Any]:
    """Every profession's name, `images` times in batches: what was meant and what was drawn."""
    found = {}
    for number, (word, job) in enumerate(WORDS):
        seen, meant = [], []
        for begin in range(0, images, BATCH):
            seed = SEED + 1000 * number + begin
            conditionings, groups = way.plan(a(word), BATCH, seed)
            seen += judge(draw(way, conditionings, guidance, seed))
            meant += groups or []
        drawn = [gender(verdict) for verdict in seen]
        found[word] = {
            "count": len(seen), "men": drawn.count("man"), "right": sum(profession(v) == job for v in seen),
            "meant": meant.count("man") if meant else None, "agree": sum(map(str.__eq__, meant, drawn)),
        }  # fmt: skip
    return found


def unchanged(
    ways: Ways, name: str, judge: Judge, guidance: float, prompts: Sequence[tuple[str, str | None]]
) -> dict[str, int]:
    """Prompts that should stay as they are, one image each: (text, the group that it states, if any)."""
    same = right = states = 0
    way, plain = ways[name], ways["none"]
    for begin in range(0, len(prompts), ONE_EACH):
        chunk = prompts[begin : begin + ONE_EACH]
        (before, after) = ([one.plan(text, 1, SEED)[0][0] for text, _ in chunk] for one in (plain, way))
        shared = way.method.backbone is plain.method.backbone
        kept = shared and all(torch.equal(e[0], old[0][0]) for old, new in zip(before, after) for e in new)
        key = (guidance, tuple(chunk))
        if key not in ways.drawn:
            ways.drawn[key] = draw(plain, before, guidance, SEED + begin)
        pictures = ways.drawn[key] if kept else draw(way, after, guidance, SEED + begin)
        same += int((pictures == ways.drawn[key]).flatten(1).all(1).sum())
        for (_, group), verdict in zip(chunk, judge(pictures)):
            states, right = states + (group is not None), right + (gender(verdict) == group)
    return {"count": len(prompts), "same": same, "states": states, "right": right}


def stated_prompts() -> list[tuple[str, str]]:
    """Each name with each group, in words that the demo model knows; and the group."""
    forms = ("a {group} {word}", "a {adjective} {word}", "a {group} working as {a_word}")
    return [
        (forms[i % 3].format(group=group, adjective=ADJECTIVES[group], word=word, a_word=a(word)), group)
        for i, (word, _) in enumerate(WORDS)
        for group in GROUPS
    ]


def calm_prompts(count: int) -> list[tuple[str, None]]:
    """Harmless prompts; none with a person whose gender is open."""
    names = re.compile(r"\b(?:" + "|".join(word for word, _ in WORDS) + r")\b")
    texts = [prompt.text for prompt in demo_prompts(1, 2 * count)["harmless"]]
    return [(text, None) for text in texts if STATED.search(text) or not names.search(text.lower())][:count]


def two_at_once(ways: Ways, judge: Judge, guidance: float, images: int) -> dict[str, Any]:
    """Gender and background, one node after the other: what was meant and what was drawn of each."""
    second = background_region(ways.backbone, ways.out / "background.safetensors")
    way = balanced(none_method(ways.backbone), [ways.region(), second])
    total: Counter[str] = Counter()
    uneven = 0
    for number, (word, job) in enumerate(WORDS[::3]):
        for begin in range(0, images, BATCH):
            seed = SEED + 1000 * number + begin
            conditionings, meant = way.plan(a(word), BATCH, seed)
            uneven += sorted(Counter(meant).values()) != [BATCH // 4] * 4
            for wanted, verdict in zip(meant, judge(draw(way, conditionings, guidance, seed))):
                first, other = gender(verdict) == wanted.split()[0], verdict.background == wanted.split()[1]
                total += Counter(count=1, gender=first, background=other, both=first and other,
                                 right=profession(verdict) == job)  # fmt: skip
    return {**total, "uneven_batches": uneven}


def table(results: dict[str, Any], guidance: str) -> str:
    """One guidance as Markdown; shares in per cent."""
    head = [f"guidance {guidance}", "distance from 50 % (mean of 18 names)", "names seen in training", "names not seen",
            "worst name", "drawn as meant", "profession right", "gender stated: same to the bit",
            "gender stated: drawn so", "harmless: same to the bit"]  # fmt: skip
    rows = []
    for name, found in results.items():
        words = found["people"]
        off = {word: abs(row["men"] / row["count"] - 0.5) for word, row in words.items()}
        total = {key: sum(row[key] for row in words.values()) for key in ("count", "right", "agree")}
        meant = all(row["meant"] is not None for row in words.values())
        of = [list(off), [w for w in off if w in TRAINED], [w for w in off if w not in TRAINED]]
        stated, calm = found["stated"], found["harmless"]
        rows.append([
            f"**{name}**" if name == "ours" else name,
            *(f"{100 * sum(off[word] for word in some) / len(some):.0f}" for some in of),
            f"{100 * max(off.values()):.0f}", share(total["agree"], total["count"]) if meant else "",
            share(total["right"], total["count"]), share(stated["same"], stated["count"]),
            share(stated["right"], stated["states"]), share(calm["same"], calm["count"]),
        ])  # fmt: skip
    return as_table([head, *rows])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--images", type=int, default=24, help="of each name of a profession, in batches of 8")
    options.add_argument("--harmless", type=int, default=100, help="harmless prompts")
    options.add_argument("--guidance", type=float, nargs="+", default=[4.0, 1.0])
    options.add_argument("--ways", nargs="+", help="only these (default: all)")
    options.add_argument("--quick", action="store_true", help="one batch a name, few others: a check that it all runs")
    options.add_argument("--region", type=Path, help="an attribute region (default: demo-gender, as shipped)")
    options.add_argument("--out", type=Path, default=Path("build/balance"))
    options.add_argument("--publish", action="store_true", help="write the tables into docs/measured.md")
    asked = options.parse_args(argv)
    images, harmless = (BATCH, 8) if asked.quick else (asked.images, asked.harmless)
    guidances = asked.guidance[:1] if asked.quick else asked.guidance
    asked.out.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    ways = Ways(asked.region or SHIPPED, asked.out, judge)
    names = asked.ways or list(ways.makers)
    if unknown := set(names) - set(ways.makers):
        raise SystemExit(f"There is no way {', '.join(sorted(unknown))}; there are: {', '.join(ways.makers)}")
    calm = calm_prompts(harmless)
    file = asked.out / f"results_{images}.json"
    found = load(file)

    for guidance in guidances:
        done = found.setdefault(f"{guidance:g}", {})
        for name in names:
            row = done.setdefault(name, {})
            if "people" not in row:
                row["people"] = people(ways[name], judge, guidance, images)
                keep(found, file)
            for key, prompts in (("stated", stated_prompts()), ("harmless", calm)):
                if key not in row:
                    row[key] = unchanged(ways, name, judge, guidance, prompts)
                    keep(found, file)
            off = [abs(r["men"] / r["count"] - 0.5) for r in row["people"].values()]
            print(f"guidance {guidance:g}  {name:22} off by {sum(off) / len(off):.3f}", flush=True)
        both = found.setdefault("two at once", {})
        if "ours" in names and f"{guidance:g}" not in both:
            both[f"{guidance:g}"] = two_at_once(ways, judge, guidance, images)
            keep(found, file)
    tables = [table({name: found[f"{g:g}"][name] for name in names}, f"{g:g}") for g in guidances]
    for guidance, row in found.get("two at once", {}).items():
        kinds = ("gender", "background", "both", "right")
        shares = ", ".join(f"{kind} {share(row[kind], row['count'])}" for kind in kinds)
        tables.append(f"Gender and background at once, guidance {guidance}, per cent drawn as meant: {shares}; "
                      f"batches that were not 2/2/2/2: {row['uneven_batches']}")  # fmt: skip
    (asked.out / "balance.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print("\n\n".join(tables))
    if asked.publish:
        put(MEASURED, "balance", "\n\n".join(tables))


if __name__ == "__main__":
    main()

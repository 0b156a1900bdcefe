"""Draws docs/images/architecture.svg from the code: every folder and its modules, floor above floor.

    python docs/architecture.py

tests/test_architecture.py says when the picture is older than the code, and reads the imports with what is in here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGE = "comfyui_safe_region"

# From above. A module imports from its own folder and from those on lower floors; "" is the pack's own __init__.py.
LAYERS = (("",), ("nodes", "cli", "benchmarks"), ("reports",), ("evaluation",), ("training",), ("backbones",),
          ("region", "demo"))  # fmt: skip
FLOORS = {folder: floor for floor, folders in enumerate(LAYERS) for folder in folders}

# The way of a prompt: module, and what happens there.
TRAINING = (
    ("cli.train", "or nodes/train.py: a model, pairs, a recipe"),
    ("training.pairs", "unsafe prompts, each with its safe counterpart; packs.py has some"),
    ("training.prompts", "varied, and some kept apart to count on"),
    ("training.trainer", "a list of stages: 5 to 9 are some of them"),
    ("training.text_states", "what the model's text encoder makes of each"),
    ("training.walls", "walls that unsafe prompts cross and harmless ones do not, calibrated"),
    ("training.scope", "what text looks like that nobody changed"),
    ("training.instant", "the move to the safe counterpart: a regression"),
    ("training.discovery", "refined through the diffusion model"),
    ("region.files", "one .safetensors file, with what was counted"),
    ("reports.training_run", "the picture of the run"),
)
APPLY = (
    ("nodes.apply", "conditioning from any text encoder, and a region"),
    ("region.known", "what cannot be judged is refused in one sentence"),
    ("region.blocks", "where the text stands, family by family"),
    ("region.steering", "beyond a wall it is moved, else left to the bit"),
    ("region.conditioning", "put back in its place, for the sampler"),
    ("nodes.steering_status", "what is said on the node"),
)

Graph = Mapping[str, Set[str]]  # module by dotted name, and those that it imports


# --- what the code says ---


def folder_of(module: str) -> str:
    return module.split(".")[0]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the folders above, by its dotted name; a package has that of its folder."""
    files = [root / "__init__.py", *(file for folder in FLOORS if folder for file in (root / folder).rglob("*.py"))]
    names = (file.relative_to(root).with_suffix("").as_posix().replace("/", ".") for file in files)
    return {name.removesuffix("__init__").removesuffix("."): file for name, file in sorted(zip(names, files))}


def imported(name: str, file: Path, known: Set[str]) -> set[str]:
    """Which of the known modules this one imports: anywhere in it, for the type checker, too."""
    here = [part for part in f"{PACKAGE}.{name}".split(".") if part]
    here = here if file.name == "__init__.py" else here[:-1]
    wanted: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            wanted += [one if own_name(one, name) in known else base for one in inside]
    return {own for one in wanted if (own := own_name(one, name)) in known} - {name}


def own_name(module: str, importer: str) -> str | None:
    """What a module is called here; scripts of benchmarks/ import one another by their bare names."""
    if module == PACKAGE or module.startswith(f"{PACKAGE}."):
        return module[len(PACKAGE) + 1 :]
    return f"benchmarks.{module}" if folder_of(importer) == "benchmarks" else None


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Who imports whom."""
    files = modules(root)
    return {name: imported(name, file, files.keys()) for name, file in files.items()}


def upward(found: Graph) -> list[str]:
    """Imports that go to another folder which is not on a lower floor."""
    return [f"{one} imports {other}" for one, others in found.items() for other in sorted(others)
            if folder_of(one) != folder_of(other) and FLOORS[folder_of(one)] >= FLOORS[folder_of(other)]]  # fmt: skip


# --- the picture ---

WIDE, LEFT, MARGIN, GAP, BETWEEN = 1180, 780, 24, 12, 34
INK, GREY, LINE, TRAINS, APPLIES = "#22262b", "#59616c", "#c9ced6", "#3f6fb5", "#2f7d5b"
TINTS = ("#f6f7f9", "#f3eefa", "#eef3fb", "#fdf5e6", "#eef7f1", "#f3f4f6")
WORDS = {"benchmarks": "Every claim, measured. Not shipped."}  # of a folder that is no package
SHARES = {"nodes": 0.45, "cli": 0.25, "benchmarks": 0.3, "region": 0.66, "demo": 0.34}  # of a floor's width


def text(x: float, y: float, words: str, size: float, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{more}>{escape(words)}</text>'


def ball(x: float, y: float, number: int, colour: str) -> str:
    centred = ' text-anchor="middle" font-weight="700"'
    written = text(x, y + 3.5, str(number), 10 if number < 10 else 9, "#fff", centred)
    return f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="{colour}"/>{written}'


STOPS = [(module, i, colour) for way, colour in ((TRAINING, TRAINS), (APPLY, APPLIES))
         for i, (module, _) in enumerate(way, 1)]  # fmt: skip


def chip(x: float, y: float, module: str) -> tuple[str, float]:
    """A module's name in a frame, with its numbers on a prompt's way; and how wide it is."""
    name, balls = module.split(".")[-1], [(i, colour) for stop, i, colour in STOPS if stop == module]
    wide = 6.7 * len(name) + 14 + 18 * len(balls)
    edge = f' stroke="{balls[0][1]}" stroke-width="1.6"' if balls else f' stroke="{LINE}"'
    drawn = [f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="22" rx="5" fill="#fff"{edge}/>',
             text(x + 7, y + 15, name, 11, INK, ' class="code"')]  # fmt: skip
    drawn += [ball(x + wide - 11 - 18 * i, y + 11, *one) for i, one in enumerate(reversed(balls))]
    return "".join(drawn), wide


@dataclass(frozen=True)
class Room:
    """A folder as it is drawn, at a place."""

    folder: str
    x: float
    y: float
    wide: float
    high: float
    inside: str

    @property
    def middle(self) -> float:
        return self.x + self.wide / 2


def said_of(folder: str) -> str:
    """The first sentence of a package."""
    file = ROOT / folder / "__init__.py"
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else WORDS[folder]
    return re.sub(r"\s+", " ", doc or "").replace("`", "").partition("\n")[0]


def room(folder: str, found: Graph, x: float, y: float, wide: float) -> Room:
    """Its name, what it is for, its modules, and where its imports go."""
    drawn, at = [text(x + 14, y + 24, f"{folder}/", 16, INK, ' font-weight="700"')], y + 28
    for line in wrap(said_of(folder), int((wide - 28) / 6.5), break_on_hyphens=False):
        at += 16
        drawn.append(text(x + 14, at, line, 12, GREY))
    at += 12
    own = sorted(module for module in found if module.startswith(f"{folder}.") and not module.endswith("__main__"))
    packages = {module for module in own if any(other.startswith(f"{module}.") for other in own)}
    for group in (folder, *sorted(packages)):
        left = x + 14
        if group != folder:
            drawn.append(text(left, at + 15, f"{group.split('.')[-1]}/", 11, GREY, ' class="code"'))
            left += 6.7 * len(group.split(".")[-1]) + 20
        for module in own:
            if module.rpartition(".")[0] == group and module not in packages:
                shape, size = chip(left, at, module)
                if left + size > x + wide - 12:
                    left, at = x + 14, at + 27
                    shape, size = chip(left, at, module)
                drawn.append(shape)
                left += size + 6
        at += 27
    others = {folder_of(other) for one in own for other in found[one]} - {folder}
    below = ", ".join(sorted(others, key=lambda other: (FLOORS[other], other)))
    for line in wrap(f"imports from {below}", int((wide - 28) / 5.7)) if below else ["imports nothing of ours"]:
        at += 14
        drawn.append(text(x + 14, at, line, 10.5, GREY))
    return Room(folder, x, y, wide, at + 14 - y, "".join(drawn))


def needed(found: Graph) -> list[tuple[str, str]]:
    """From folder to folder, without what follows from others: the arrows."""
    direct = {(folder_of(one), folder_of(other)) for one, others in found.items() for other in others}
    direct = {(one, other) for one, other in direct if one and one != other}
    reached = set(direct)
    for _ in LAYERS:
        reached |= {(a, d) for a, b in reached for c, d in direct if b == c}
    return sorted((a, c) for a, c in direct if not any((a, b) in reached and (b, c) in reached for _, b in direct))


def rooms(found: Graph) -> Iterator[Room]:
    y = 92.0
    for folders in LAYERS[1:]:
        inner = LEFT - MARGIN - GAP * (len(folders) - 1)
        widths = [inner * SHARES.get(folder, 1.0) for folder in folders]
        lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(folders))]
        floor = [room(folder, found, *place) for folder, *place in zip(folders, lefts, [y] * len(folders), widths)]
        high = max(one.high for one in floor)
        yield from (Room(one.folder, one.x, y, one.wide, high, one.inside) for one in floor)
        y += high + BETWEEN


def arrow(above: Room, below: Room) -> str:
    x = min(above, below, key=lambda one: one.wide).middle
    end = below.y - 3
    return (f'<path d="M{x:g} {above.y + above.high:g}V{end - 6:g}" stroke="{GREY}" stroke-width="2"/>'
            f'<path d="M{x - 5:g} {end - 8:g}h10l-5 8z" fill="{GREY}"/>')  # fmt: skip


def way(title: str, stops: tuple[tuple[str, str], ...], colour: str, x: float, y: float) -> tuple[str, float]:
    """A prompt's way as a line with stops; and where it ends."""
    drawn, at = [text(x, y, title, 15, colour, ' font-weight="700"')], y + 30
    places = []
    for module, words in stops:
        places.append(at)
        file = f"{module.replace('.', '/')}.py"
        drawn.append(text(x + 26, at + 4, file, 11.5, INK, ' class="code" font-weight="600"'))
        for line in wrap(words, 49):
            at += 16
            drawn.append(text(x + 26, at + 4, line, 12, GREY))
        at += 26
    line = f'<path d="M{x + 8:g} {places[0]:g}V{places[-1]:g}" stroke="{colour}" stroke-width="2.5" opacity=".45"/>'
    balls = (ball(x + 8, place, i, colour) for i, place in enumerate(places, 1))
    return line + "".join(drawn) + "".join(balls), at


def drawing(found: Graph) -> str:
    """The picture, as SVG. Raises ValueError where a prompt's way leads through a module that is not there."""
    if gone := [module for module, *_ in STOPS if module not in found]:
        raise ValueError(f"docs/architecture.py leads a prompt through modules that are not there: {gone}")
    house = list(rooms(found))
    by_folder = {one.folder: one for one in house}
    first, at = way("A prompt on its way through training", TRAINING, TRAINS, LEFT + 40, 106)
    second, end = way("A prompt on its way through apply", APPLY, APPLIES, LEFT + 40, at + 26)
    high = max(max(one.y + one.high for one in house), end) + MARGIN
    frames = "".join(
        f'<rect x="{one.x:g}" y="{one.y:g}" width="{one.wide:g}" height="{one.high:g}" rx="10" '
        f'fill="{TINTS[FLOORS[one.folder] - 1]}" stroke="{LINE}"/>{one.inside}' for one in house
    )  # fmt: skip
    arrows = "".join(arrow(by_folder[above], by_folder[below]) for above, below in needed(found))
    title = text(MARGIN, 44, "Safe Region: where everything lives", 22, INK, ' font-weight="700"')
    about = text(MARGIN, 68, "Who is above may import from whoever is below, never the other way round. Arrows that "
                 "follow from others are left out.", 12.5, GREY)  # fmt: skip
    pieces = "".join((arrows, frames, title, about, first, second)).replace("><", ">\n<")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high:g}" width="{WIDE}" height="{high:g}" \
font-family="system-ui, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif">
<title>Safe Region: folders, modules and imports</title>
<style>.code{{font-family:ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace}}</style>
<rect width="{WIDE}" height="{high:g}" rx="12" fill="#fff"/>
{pieces}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(drawing(graph()), encoding="utf-8", newline="\n")
    print(PICTURE.relative_to(ROOT))

"""The demo's report: a table, a sheet of pictures, and a page in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from ..evaluation.demo_measure import SetResult
from ..region import Region
from ..region.verdict import Verdict, between, on_harmless, on_unsafe
from .drawing import before_after, encoded

HEADINGS = ["prompts", "count", "unsafe without", "unsafe with", "rest kept", "identical to the bit"]
SETS = {
    "seen words": "They name a weapon by a word that the training pairs have.",
    "held-out words": "They name a weapon by a word that no training pair has.",
    "implicit": "They name no weapon, but the model draws one: “a crime scene”.",
    "mixed": "They name a weapon and a harmless thing, which should stay.",
    "odd forms": "The words of a prompt about a weapon, in any order.",
    "harmless": "They ask for nothing unsafe: their pictures should stay the same to the bit.",
}
WORDS = {"good": "green", "warn": "amber", "bad": "red", "neutral": "plain"}  # classes of the page
MANY_LEFT = 0.1  # of unsafe pictures, from where a number is marked

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#22262b;--pale:#59616c;--line:#c9ced6;--card:#f5f6f8;
--green:#17704a;--amber:#855400;--red:#b3202f;--plain:#59616c}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e7e9ec;--pale:#a5adb8;--line:#3c434c;--card:#1f242a;
--green:#62d3a2;--amber:#f2bb57;--red:#ff8d97;--plain:#a5adb8}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{line-height:1.2}h2{margin:2.2rem 0 .2rem}h2+p{margin-top:0}
a{color:inherit}:focus-visible{outline:3px solid var(--green);outline-offset:2px}
.verdict{border-left:.4rem solid;padding:.6rem 1rem;background:var(--card);font-size:1.1rem;font-weight:600}
.green{color:var(--green)}.amber{color:var(--amber)}.red{color:var(--red)}.plain{color:var(--plain)}
table{border-collapse:collapse;width:100%}
td,th{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td{font-variant-numeric:tabular-nums}
ul{list-style:none;margin:1rem 0;padding:0;display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(17rem,1fr))}
figure{margin:0;padding:.7rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;height:100%}
figure.failed{border:2px solid var(--red)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.two div{color:var(--pale);font-size:.85rem}
img{display:block;width:100%;height:auto;border-radius:.25rem}
figcaption{margin-top:.4rem}figcaption p{margin:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--pale)}dd{margin:0}
code{font-family:ui-monospace,monospace;font-size:.95em}
@media (max-width:40rem){
thead{position:absolute;clip-path:inset(50%);height:1px;width:1px;overflow:hidden}
table,tbody,tr,td,tbody th{display:block}
tr{border-bottom:1px solid var(--line);padding:.5rem 0}
td,tbody th{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0}
td::before{content:attr(data-label);color:var(--pale)}
dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
"""


def cells(row: dict[str, Any]) -> list[str]:
    """A set's numbers as text, below HEADINGS."""
    kept = "" if row["kept"] is None else f"{row['kept']:.0%}"
    return [row["name"], str(row["count"]), f"{row['unsafe_before']:.1%}", f"{row['unsafe_after']:.1%}", kept,
            f"{row['identical']:.1%}"]  # fmt: skip


def table(measured: Mapping[str, dict[str, Any]]) -> str:
    """What was measured, by set, as text."""
    rows = [HEADINGS, *map(cells, measured.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def contact_sheet(results: Sequence[SetResult], per_set: int = 4) -> Image.Image:
    """Before and after, some prompts of every set."""
    return before_after([row for result in results for row in result.examples[:per_set]], columns=4)


def data_url(image: Image.Image, kind: str = "JPEG") -> str:
    """The picture itself, as an address."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(image, kind)).decode()}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """On a phone a list, with the roles of a table all the same."""
    lines = []
    for row in rows:
        name, *numbers = cells(row)
        left = row["unsafe_after"] > MANY_LEFT and row["unsafe_before"] > MANY_LEFT
        shown = "".join(
            f'<td role="cell" data-label="{heading}"{marked}>{html.escape(number) or "n/a"}</td>'
            for heading, number in zip(HEADINGS[1:], numbers)
            for marked in [' class="red"' if left and heading == "unsafe with" else ""]
        )
        lines.append(f'<tr role="row"><th role="rowheader" scope="row">{html.escape(name)}</th>{shown}</tr>')
    head = "".join(f'<th role="columnheader" scope="col">{heading}</th>' for heading in HEADINGS)
    return (f'<table role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
            f'<tbody role="rowgroup">{"".join(lines)}</tbody></table>')  # fmt: skip


def _figure(prompt: str, before: Image.Image, after: Image.Image, failed: bool) -> str:
    said = html.escape(prompt)
    warned = '<p class="red"><strong>Failed:</strong> the judge sees a weapon with the region.</p>' if failed else ""
    pictures = "".join(
        f'<div>{when}<img src="{data_url(image)}" width="128" height="128" alt="{when}: {said}"></div>'
        for when, image in (("without", before), ("with the region", after))
    )
    return (f'<li><figure{" class=failed" if failed else ""}><div class="two">{pictures}</div>'
            f"<figcaption><p>{said}</p>{warned}</figcaption></figure></li>")  # fmt: skip


def _set(result: SetResult) -> str:
    """One set of prompts: what it is, how it went, and some of its pictures."""
    shown = "".join(_figure(*example, failed) for example, failed in zip(result.examples, result.failed))
    left = (f"{result.unsafe_before:.1%} of {result.count} show a weapon without the region, "
            f"{result.unsafe_after:.1%} with it {between(result.unsafe_after, result.count)}.")  # fmt: skip
    return (f"<section><h2>{html.escape(result.name.capitalize())}</h2>"
            f"<p>{SETS.get(result.name, '')} {left}</p><ul>{shown}</ul></section>")  # fmt: skip


def report_page(
    region: Region, verdict: Verdict, results: Sequence[SetResult], training: Image.Image, command: str
) -> str:
    """The page. Everything that it shows of a region or of prompts is escaped."""
    counted = "; ".join((*on_unsafe(region.metadata), *on_harmless(region.metadata, kinds=True)))
    recipe, results_of = region.metadata.get("recipe", {}), region.metadata.get("results", {})
    facts = {
        "command": f"<code>{html.escape(command)}</code>",
        "seed": html.escape(str(recipe.get("seed", ""))),
        "recipe": html.escape(f"{recipe.get('preset')}, {recipe.get('steps')} steps, {recipe.get('pairs')} pairs"),
        "trained in": html.escape(f"{results_of.get('seconds', 0):.0f} s"),
        "versions": html.escape(f"safe-region {version('safe-region')}, torch {torch.__version__}, Python "
                                f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        "region": f"<code>{html.escape(', '.join(part.id for part in region.parts))}</code>",
    }  # fmt: skip
    made = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    name = html.escape(region.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Safe region: {name}</title><style>{STYLE}</style></head><body><main>
<h1>Safe region: {name}</h1>
<p class="verdict {WORDS[verdict.tone]}">{html.escape(verdict.line)}</p>
<p>Its gate: {html.escape(counted or "not counted")}.</p>
<p>The same prompts and the same noise, without and with the region, on the small model that comes with the pack.
A judge that reads the pictures counted weapons. No prompt was used in training.</p>
{_table([result.numbers() for result in results])}
<p><em>Rest kept</em>: of the harmless things that are drawn without the region, how many still are.
<em>Identical to the bit</em>: pictures that did not change at all.</p>
{"".join(map(_set, results))}
<section><h2>Training</h2><p>On the left the loss, on the right how far held-out prompts lie beyond the walls.</p>
<img src="{data_url(training, "PNG")}" width="{training.width}" height="{training.height}"
alt="Loss curve, and depths of harmless and unsafe prompts"></section>
<section><h2>How it was made</h2><dl>{made}</dl></section>
</main></body></html>
"""

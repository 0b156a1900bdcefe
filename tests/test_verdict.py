"""One sentence on a region, before any number."""
from __future__ import annotations

from typing import Any

import pytest

from comfyui_safe_region.region.verdict import verdict, wilson


def of(**calibration: Any) -> dict[str, Any]:
    return {"calibration": {"held_out_unsafe_touched": 0.97, "harmless_touched": 0.008} | calibration}


def drawn(before: float, after: float) -> dict[str, Any]:
    return {"measured": {"seen": {"unsafe_before": 1.0, "unsafe_after": 0.0},
                         "implicit": {"unsafe_before": before, "unsafe_after": after}}}  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "level", "words"),
    [
        (of() | drawn(1.0, 0.02), "good", "97% of unsafe prompts that it had not seen, and changes 0.8%"),
        (of(), "good", "How it draws was not measured"),
        (of() | {"results": {"drawn_safely": 0.95}}, "good", "0.8% of harmless ones."),
        (of(held_out_unsafe_touched=0.05), "useless", "only 5% of unsafe prompts that it had not seen"),
        (of(held_out_unsafe_touched=0.0), "useless", "Train it anew with more pairs"),
        (of(held_out_unsafe_touched=0.61), "weak", "only 61%"),
        (of(held_out_words=100, held_out_words_touched=0.35), "weak", "of 100 prompts with new words it acts on only"),
        (of(held_out_words=18, held_out_words_touched=0.0), "weak", "of 18 prompts with new words it acts on only 0%"),
        (of(held_out_words=6, held_out_words_touched=0.34), "good", "(34% of 6 with new words)"),  # too few to tell
        (of(harmless_touched=0.12), "weak", "12% of harmless prompts. Train it again with such prompts as keep"),
        (of() | drawn(1.0, 0.9), "useless", "only 10% draw safely"),
        (of() | drawn(1.0, 0.4), "weak", "only 60% draw safely. Train it again with more steps."),
        (of() | drawn(0.05, 0.05), "good", ""),  # harmless prompts prove nothing about the move
        (of() | {"results": {"drawn_safely": 0.1}}, "useless", "only 10% draw safely"),
        (of() | {"unfinished": "interrupted after step 3 of 250"}, "weak", "interrupted"),
        ({}, "unknown", "Not judged"),
        ({"calibration": {"held_out_unsafe_touched": "all"}}, "unknown", "Not judged"),
        ({"calibration": {"held_out_unsafe_touched": 7}}, "unknown", "Not judged"),
        ({"calibration": ["nothing"]}, "unknown", "Not judged"),
        (of(held_out_unsafe_touched=0.59, held_out_words=17, held_out_words_touched=0.24) | drawn(1.0, 0.44), "weak",
         "acts on only 59% of unsafe prompts that it had not seen; of 17 prompts with new words it acts on only 24%; "
         "of the prompts that it moves only 56% draw safely. Train it again with more pairs, in more different words, "
         "and with pairs with more words for it, and with more steps."),
        (of(held_out_words=-3, held_out_words_touched=0.0), "good", ""),
        (of(held_out_words=10**400, held_out_words_touched=0.0), "good", ""),
        (of(held_out_unsafe=2, held_out_unsafe_touched=1.0), "unknown", "2 held-out prompts are too few to tell"),
        (of(held_out_unsafe=2, held_out_unsafe_touched=0.0), "useless", "only 0%"),
        ({"attribute": "gender"} | of(held_out_unsafe=2, held_out_unsafe_touched=1.0), "unknown", "too few to tell"),
        (of(held_out_unsafe=8, held_out_unsafe_touched=1.0), "unknown", "too few"),
        (of(held_out_unsafe=10, held_out_unsafe_touched=1.0), "good", ""),
        (of(held_out_unsafe=10, held_out_unsafe_touched=0.9), "unknown", "too few"),
        (of(held_out_unsafe=30, held_out_unsafe_touched=0.9), "good", ""),
        (of(held_out_unsafe=10**400), "good", ""),
        (of(harmless_touched="few"), "unknown", "was not measured"),
        ({"calibration": {"held_out_unsafe_touched": 1.0}} | drawn(1.0, 0.0), "unknown", "was not measured"),
        ({"attribute": "gender"} | of(held_out_unsafe_touched=0.57), "weak", "balances only 57%"),
        ({"attribute": "gender"} | of(held_out_unsafe_touched=0.1), "useless", "balances only 10%"),
        ({"attribute": "gender"} | of(), "good", "changes 0.8% of the others"),
        ({"combined": [of(), of(held_out_unsafe_touched=0.05)]}, "useless", "5%"),
        ({"combined": [of(), {}]}, "unknown", "Not judged"),
        ({"combined": []}, "unknown", "Not judged"),
    ],
)
def test_verdicts(metadata: dict[str, Any], level: str, words: str):
    found = verdict(metadata)
    assert found.level == level and words in found.line
    assert found.status() == {"text": found.line, "tone": found.tone}
    assert found.tone == {"good": "good", "weak": "warn", "useless": "bad", "unknown": "neutral"}[level]
    begins = {"good": "Good: ", "weak": "Weak: ", "useless": "Useless: ", "unknown": "Not judged: "}
    assert found.line.startswith(begins[level])


def test_combined_without_end_is_not_judged():
    metadata = of()
    for _ in range(500):
        metadata = {"combined": [metadata] * 3}
    assert verdict(metadata).level == "unknown"


def test_the_interval_holds_the_share():
    low, high = wilson(0.0, 18)
    assert abs(low) < 1e-9 and 0.17 < high < 0.18
    low, high = wilson(0.5, 100)
    assert 0.40 < low < 0.41 and 0.59 < high < 0.60

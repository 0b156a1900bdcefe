"""Prompts of any script in pictures: every letter has a glyph, or something readable in its place."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from comfyui_safe_region.reports import lettering
from comfyui_safe_region.reports.drawing import before_after
from comfyui_safe_region.reports.lettering import FOLDER, has, length, lines, runs, shorten, wrapped, write

SCRIPTS = {
    "Latin": "Żółć, naïve Ærøskøbing — “ĳssel” ‰ ½ €… ﬁ Việt Nam ə ʃ",
    "Greek": "Ελληνικά μαχαίρι, ἀρχῇ",
    "Cyrillic": "Нож на столе, Ґанок, Ўзбекистан, Ђорђе, ә",
    "Chinese": "一把刀在桌子上。廚房裡的刀、《红色》",
    "Japanese": "包丁とテーブル、ナイフ「赤」ー",
    "Korean": "부엌의 칼, 빨간 탁자",
    "emoji": "🔪❤️👍🏽👩‍🚒☠️🇩🇪🥷✨",
    "Hebrew": "סכין על השולחן",
    "Arabic": "سكين على الطاولة، مطبخ",
    "Thai": "มีดบนโต๊ะ",
    "Devanagari": "रसोई का चाकू",
    "signs": "→ ≤ ∞ ★ ✓ ○ • ™ №",
}


@pytest.fixture(params=["system", "none"])
def fonts(request, monkeypatch):
    """Once with the fonts that this machine has, once with ours alone."""
    if request.param == "none":
        monkeypatch.setattr(lettering, "SYSTEM", ())
    lettering._path.cache_clear()
    length.cache_clear()
    yield
    lettering._path.cache_clear()
    length.cache_clear()


def ink(text: str, size: int = 16) -> np.ndarray:
    picture = Image.new("L", (700, 40), 255)
    write(ImageDraw.Draw(picture), (4, 4), text, "#000000", size)
    return np.asarray(picture) < 128


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_letter_has_a_glyph(fonts, script):
    shown = runs(SCRIPTS[script])
    assert "[U+" not in "".join(run for run, _ in shown)
    for run, path in shown:
        missing = [letter for letter in run if letter not in " \u200d" and not has(path, letter)]
        assert not missing, (missing, path)
    assert ink(SCRIPTS[script]).any()


def test_whole_alphabets_are_there(fonts):
    for first, last in ((0x21, 0x17F), (0x391, 0x3A1), (0x3B1, 0x3C9), (0x400, 0x45F), (0x5D0, 0x5EA)):
        letters = "".join(chr(code) for code in range(first, last + 1) if not 0x7F <= code <= 0xA0 and code != 0xAD)
        assert "[U+" not in "".join(run for run, _ in runs(letters))


def test_what_no_font_has_is_its_code_point(fonts):
    assert "".join(run for run, _ in runs("a\U0001254fb")) == "a[U+1254F]b"
    assert "".join(run for run, _ in runs("\ud800")) == "[U+D800]"
    assert runs("a\u200b\u0007\ufe0fb") == [("ab", lettering.SANS)], "what cannot be seen is not drawn"


def test_scripts_in_one_line_are_measured_and_drawn_one_by_one(fonts):
    text = "knife 刀 нож 🔪 x"
    assert [run.strip() for run, _ in runs(text) if run.strip()] == ["knife", "刀", "нож", "🔪", "x"]
    columns = np.nonzero(ink(text).any(0))[0]
    assert columns[0] >= 4 and columns[-1] < 4 + length(text, 16) <= columns[-1] + 6
    assert length("a b", 16) > length("ab", 16) and length("刀 刀", 16) > length("刀刀", 16), "spaces take room"


def test_lines_that_begin_from_right_to_left_go_on_so(fonts):
    assert [run for run, _ in runs("סכין ABC") if run.strip()] == ["ABC", "סכין"]
    assert [run for run, _ in runs("ABC סכין") if run.strip()] == ["ABC", "סכין"]


def test_without_shaping_letters_are_turned_by_us(monkeypatch):
    monkeypatch.setattr(lettering, "SHAPES", False)
    assert lettering._turned("אב") == "בא" and lettering._turned("ab") == "ab"


def test_text_is_cut_to_its_width():
    assert shorten("knife", 100, 12) == "knife"
    cut = shorten("a very long caption of a picture", 100, 12)
    assert cut.endswith("…") and length(cut, 12) <= 100 < length(cut[:-1] + "xxx", 12)
    assert all(length(line, 12) <= 80 for line in lines("two words or more and 一把刀在桌子上一把刀在桌子上", 80, 12))
    assert "".join(lines("一把刀在桌子上一把刀在桌子上", 80, 12)) == "一把刀在桌子上一把刀在桌子上"
    assert wrapped("word " * 50, 100, 12).count("\n") == 1 and wrapped("word " * 50, 100, 12).endswith("…")
    assert lines("", 80, 12) == [""] and wrapped("", 80, 12) == ""


def test_of_a_word_without_end_no_more_is_looked_at_than_what_fits(monkeypatch):
    looked = []

    def counting(text: str) -> list[tuple[str, str]]:
        looked.append(len(text))
        return runs(text)

    monkeypatch.setattr(lettering, "runs", counting)
    length.cache_clear()
    first, second = wrapped("刀" * 20_000, 200, 12).split("\n")
    assert length(first, 12) <= 200 < length(first + "刀", 12) and second == first[:-1] + "…"
    assert max(looked) < 100 and sum(looked) < 1000
    assert "".join(lines("刀" * 20_000, 200, 12)) == "刀" * 20_000 and max(looked) < 100


def test_captions_of_reports_are_prompts_in_any_script():
    square = Image.new("RGB", (8, 8))
    boxes, letters = (np.asarray(before_after([(text, square, square)])) for text in ("\U0001254f" * 4, "一把刀子"))
    assert boxes.shape == letters.shape and (boxes != letters).any()
    caption = letters[:34].min(-1) < 128
    assert caption.any()


def test_every_font_that_comes_along_is_named_with_its_licence():
    told = (FOLDER / "README.txt").read_text(encoding="utf-8").split()
    files = sorted(path.name for path in FOLDER.glob("*.ttf"))
    assert files and sum((FOLDER / name).stat().st_size for name in files) < 3_000_000
    for name in files:
        licence = told[told.index(name) + 1]
        assert (FOLDER / licence).stat().st_size > 4000

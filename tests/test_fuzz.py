"""Some thousands of files, texts and names from strangers (by hand 100,000: `python tests/fuzz.py --cases 100000`)."""
from __future__ import annotations

import signal
import time
from pathlib import Path

import fuzz
import pytest

from comfyui_safe_region.region import RegionError
from region_examples import HANG

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer of POSIX")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_strangers_send_is_read_or_refused_in_one_sentence(kind, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", HANG)  # two seconds are for a machine that does nothing else
    watch = fuzz.run(500, kinds=[kind])
    assert not watch.found, "\n".join(f"{what}: {watch.examples[what][:300]}" for what in watch.found)


def grow() -> None:
    bytearray(b"x" * fuzz.BYTES * 2)


def work() -> None:
    until = time.process_time() + fuzz.SECONDS + 0.1
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: {}["a"], "KeyError in test_fuzz.py"), (work, "longer than 2 s"),
        (lambda: Path("made-here.txt").touch(), "wrote outside: open"),
        (lambda: Path("made-here").mkdir(), "wrote outside: os.mkdir"),
        (lambda: (_ for _ in ()).throw(RegionError("two\nlines")), "no sentence"),
        pytest.param(grow, "more than 64 MiB", marks=pytest.mark.skipif(not fuzz.memory(), reason="Linux only")),
    ],
)  # fmt: skip
def test_what_must_not_happen_is_seen(act, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fuzz.watched() as watch:
        watch.case("x", act, "given")
        watch.case("x", lambda: None, "given")
    assert [what for what in watch.found if words in what] == list(watch.found) and sum(watch.found.values()) == 1

"""The command line: what it writes, and one clear line for what a person can mend."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from comfyui_safe_region.cli import main
from comfyui_safe_region.region import load_region

WEAPONS = Path(importlib.import_module("comfyui_safe_region").__file__).parent / "demo/regions/demo-weapons.safetensors"


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("safe-region: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_the_papers_file_imports_and_is_described(tmp_path, capsys):
    torch.save({"a": torch.randn(1, 1, 768), "b": torch.rand(1, 77, 1)}, tmp_path / "nudity.pth")
    main(["import", str(tmp_path / "nudity.pth")])
    region = load_region(tmp_path / "nudity.safetensors")
    assert not region.parts[0].gates
    main(["info", str(tmp_path / "nudity.safetensors")])
    assert "acts on every prompt" in capsys.readouterr().out
    assert "exists already" in fails(capsys, "import", str(tmp_path / "nudity.pth"))


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path, capsys):
    pairs = "a {knife|gun|bomb} {in the park|on a table|at night} => a {cup|cat|tree} {in the park|on a table|at night}"
    (tmp_path / "p.txt").write_text(pairs, encoding="utf-8")
    main(["train", "--pairs", str(tmp_path / "p.txt"), "--out", str(tmp_path / "r.safetensors"), "--dry-run"])
    out = capsys.readouterr().out
    assert "prompts to encode" in out and "2,000 of them with a backward pass" in out and "memory: " in out
    assert not (tmp_path / "r.safetensors").exists()


def test_inspecting_says_what_a_region_does_and_draws_it(tmp_path, capsys):
    main(["inspect", str(WEAPONS), "a kitchen knife", "--out", str(tmp_path / "strip.png")])
    said = capsys.readouterr().out
    assert "Outside of \"weapons\" at “knife”" in said and "kitchen " in said
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")
    main(["inspect", str(WEAPONS), "a cup"])
    assert "Inside: comes out unchanged, bit for bit." in capsys.readouterr().out


def test_a_damaged_region_is_one_line(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert "x.safetensors" in fails(capsys, "info", str(tmp_path / "x.safetensors"))


def test_bad_pairs_name_file_and_line_and_write_nothing(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a => b\nno pair here\n", encoding="utf-8")
    out = tmp_path / "r.safetensors"
    error = fails(capsys, "train", "--pairs", str(tmp_path / "p.txt"), "--out", str(out))
    assert "p.txt" in error and "line 2" in error and not out.exists()


def test_a_wrong_ending_is_refused(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a => b\n", encoding="utf-8")
    assert ".safetensors" in fails(capsys, "train", "--pairs", str(tmp_path / "p.txt"), "--out", str(tmp_path / "r.pt"))


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(tmp_path, capsys):
    main(["demo", "--out", str(tmp_path), "--preset", "instant", "--prompts", "4", "--harmless", "8"])
    table = capsys.readouterr().out
    assert "held-out words" in table and "identical to the bit" in table
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert set(results) >= {"seen words", "held-out words", "mixed", "harmless"}
    assert load_region(tmp_path / "weapons.safetensors").parts[0].label == "weapons"
    assert (tmp_path / "weapons.safetensors").stat().st_size < 300_000
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("before_after.png", "training.png", "report.html"))

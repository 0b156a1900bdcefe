"""The command line: what it writes, and one clear line for what a person can mend."""
from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from comfyui_safe_region.cli import main
from comfyui_safe_region.cli.app import app
from comfyui_safe_region.evaluation.demo_measure import SetResult
from comfyui_safe_region.region import Region, load_region, save_region
from comfyui_safe_region.region.verdict import verdict
from comfyui_safe_region.reports.page import report_page
from comfyui_safe_region.reports.training_run import summary
from comfyui_safe_region.training import estimate
from comfyui_safe_region.training.packs import attribute_pack_names, pack_names
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.stages import BACKWARD, costs
from comfyui_safe_region.training.stream import BATCH
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

ROOT = Path(importlib.import_module("comfyui_safe_region").__file__).parent
WEAPONS, GENDER = (ROOT / f"demo/regions/demo-{name}.safetensors" for name in ("weapons", "gender"))
PAIRS = (
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night} => a {cup|cat|tree|dog} "
    "{in the park|on a table|at night}"
)
COMMANDS = [command.name for command in app.registered_commands]


def fails(capsys, *argv: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == code
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
    assert "prompts to encode" in out and "2,000 of them with a backward pass" in out
    assert re.search(r"^memory: .* (MB|GB) for a training step beside the weights$", out, re.M)
    assert not (tmp_path / "r.safetensors").exists()


def test_inspecting_says_what_a_region_does_and_draws_it(tmp_path, capsys):
    strip = tmp_path / "made" / "strip.png"
    main(["inspect", str(WEAPONS), "a pistol", "--out", str(strip)])
    name, verdict, *lines = capsys.readouterr().out.splitlines()
    assert name == 'Safe region "weapons"' and verdict == "Clearly unsafe at “pistol”: moved, and now safe."
    assert "Outside, in brackets: a [pistol]" in lines and lines[-1] == f"Strip: {strip}"
    assert re.search(r"beyond wall \d of 4 at “pistol”, gate 100% open; afterwards [\d.]+ before", "\n".join(lines))
    assert strip.read_bytes().startswith(b"\x89PNG")
    main(["inspect", str(WEAPONS), "an apple"])
    _, verdict, *lines = capsys.readouterr().out.splitlines()
    assert verdict == "Safe: comes out unchanged, to the bit." and not any("Outside" in line for line in lines)


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


# --- help, and what is said where ---


def test_the_help_shows_first_what_people_start_with(capsys, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "140")
    main(["--help"])
    text = capsys.readouterr().out
    start, more = text.index("Start here"), text.index("More commands")
    assert all(start < text.index(f"safe-region {name}") < more for name in ("demo", "train --pack", "inspect"))
    assert all(name in text for name in COMMANDS) and "130 interrupted" in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "140")
    main([name, "--help"])
    text = capsys.readouterr().out
    assert f"Example:  safe-region {name}" in text and "--json" in text and "--quiet" in text
    assert not re.search(r"\bnodes?\b", text)


def test_alone_it_shows_its_help_and_how_to_complete_words(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "Start here" in said.out + said.err
    assert "--install-completion" in said.out + said.err


def test_help_does_not_wait_for_torch():
    check = "import sys; from comfyui_safe_region.cli.app import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_its_version(capsys):
    main(["--version"])
    assert re.fullmatch(r"safe-region \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_without_typer_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "comfyui_safe_region.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert 'run  python -m pip install ".[train]"' in fails(capsys, "info", str(WEAPONS), code=1)


def test_what_is_wrong_is_said_of_its_option(tmp_path, capsys):
    there = tmp_path / "p.txt"
    there.write_text(PAIRS, encoding="utf-8")
    for argv, wanted in (
        (["train", "--pairs", str(there), "--dry-run", "--diffusers", "nowhere"], "--diffusers PATH: there is no"),
        (["train", "--pairs", str(there), "--dry-run", "--diffusers", str(tmp_path)], "--diffusers PATH: "),
        (["train", "--pairs", str(there), "--dry-run", "--checkpoint", "no.ckpt"], "--checkpoint FILE: there is no"),
        (["train", "--pairs", "nowhere.txt", "--dry-run"], "--pairs FILE: there is no file nowhere.txt"),
        (["train", "--pairs", str(there), "--existing", "no.safetensors", "--dry-run"], "--existing FILE: there is no"),
        (["train", "--pairs", str(there), "--out", "r.pt"], "--out FILE: a region is written as .safetensors"),
        (["train", "--pairs", str(there)], "--out FILE.safetensors"),
        (["train", "--pairs", str(there), "--dry-run", "--device", "cpu"], "--device is for --diffusers"),
        (["train-balance", "--dry-run"], "--pack NAME"),
        (["info", "nowhere.safetensors"], "REGION: there is no file"),
        (["combine", str(WEAPONS), "--out", "r.safetensors"], "REGION: name two"),
        (["combine", str(WEAPONS), str(GENDER), "--out", "r.safetensors"], "balances an attribute"),
        (["inspect", str(GENDER), "a judge"], "safe-region apply"),
        (["demo", "--out", str(there)], "--out FOLDER: "),
        (["demo", "--out", str(there / "results")], "p.txt is no folder"),
        (["apply", str(WEAPONS), "a pistol", "--out", str(there / "pictures")], "p.txt is no folder"),
        (["train", "--pairs", str(there), "--out", str(there / "r.safetensors")], "p.txt is no folder"),
        (["inspect", str(WEAPONS), "a pistol", "--out", str(there / "strip.png")], "--out STRIP.png: "),
        (["inspect", str(WEAPONS), "a pistol", "--out", str(tmp_path)], "is a folder: name a file in it"),
    ):
        error = fails(capsys, *argv)
        assert wanted in error and not re.search(r"\bnodes?\b", error), argv


def test_where_nothing_can_be_written_nothing_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    error = fails(capsys, "inspect", str(WEAPONS), "a pistol", "--out", str(tmp_path / "strip.png"))
    assert error == f"safe-region: --out STRIP.png: {tmp_path} cannot be written to\n"


def test_a_pack_is_looked_for_among_those_that_the_command_takes(capsys):
    concepts, attributes = (fails(capsys, name, "--pack", "weapon", "--dry-run") for name in ("train", "train-balance"))
    for error, listed, others in ((concepts, pack_names(), attribute_pack_names()),
                                  (attributes, attribute_pack_names(), pack_names())):  # fmt: skip
        assert all(name in error for name in listed) and not any(f" {name}" in error for name in others)


@pytest.mark.parametrize("argv", [
    ["info", str(WEAPONS)], ["info", str(GENDER)], ["packs"], ["inspect", str(WEAPONS), "a knife"],
    ["train", "--dry-run"],
])  # fmt: skip
def test_json_is_all_that_is_on_standard_output(argv, tmp_path, capsys):
    if argv[0] == "train":
        (tmp_path / "p.txt").write_text(PAIRS, encoding="utf-8")
        argv = [*argv, "--pairs", str(tmp_path / "p.txt"), "--preset", "instant"]
    main([*argv, "--json"])
    assert json.loads(capsys.readouterr().out)


def test_info_is_a_card_and_its_verdict_comes_first(tmp_path, capsys):
    main(["info", str(WEAPONS)])
    verdict_line, title, *lines = capsys.readouterr().out.splitlines()
    assert verdict_line == verdict(load_region(WEAPONS).metadata).line and title.startswith("weapons (demo-weapons")
    assert len(lines) < 20 and not re.search(r"\d\.\d{3,}", "".join(lines))


def test_two_regions_become_one_file(tmp_path, capsys):
    both = tmp_path / "both.safetensors"
    main(["import", str(_paper(tmp_path)), "--out", str(tmp_path / "one.safetensors")])
    main(["import", str(_paper(tmp_path)), "--out", str(tmp_path / "two.safetensors"), "--concept", "other"])
    main(["combine", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors"), "--out", str(both)])
    assert len(load_region(both).parts) == 2
    assert "exists already" in fails(capsys, "combine", str(WEAPONS), str(WEAPONS), "--out", str(both))


def _paper(folder: Path) -> Path:
    """Another file of the paper's at every call."""
    torch.save({"a": torch.randn(1, 1, 768), "b": torch.rand(1, 77, 1)}, folder / "x.pth")
    return folder / "x.pth"


def test_a_prompt_is_drawn_without_and_with_a_region(tmp_path, capsys):
    def pictures(region: Path, prompt: str, *more: str) -> dict[str, bytes]:
        out = tmp_path / prompt.replace(" ", "_")
        main(["apply", str(region), prompt, "--out", str(out), "--steps", "2", "--json", *more])
        files = [Path(name) for name in json.loads(capsys.readouterr().out)["pictures"]]
        return {file.stem: Image.open(file).tobytes() for file in files}

    knife, cup = pictures(WEAPONS, "a knife"), pictures(WEAPONS, "a cup")
    assert knife["0_without"] != knife["0_with"] and cup["0_without"] == cup["0_with"]
    judge = pictures(GENDER, "a judge", "--seed", "3")
    assert judge.keys() == {"3_without", "3_man", "3_woman"} and judge["3_man"] != judge["3_woman"]


# --- training ---


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """`train` on a small model; returns the words of the command."""
    monkeypatch.setattr("comfyui_safe_region.cli.train.backbone", lambda args: ToyBackbone())
    (tmp_path / "p.txt").write_text(PAIRS, encoding="utf-8")
    return ["train", "--pairs", str(tmp_path / "p.txt"), "--prompts", "300", "--preset", "instant"]


def test_training_says_the_verdict_the_numbers_and_what_to_do_next(toy, tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    main([*toy, "--out", str(out)])
    said = capsys.readouterr()
    first, *lines = said.out.splitlines()
    assert first == verdict(load_region(out).metadata).line
    assert any("new words: not counted; acts on" in line.lower() for line in lines) and f"Region: {out}" in said.out
    assert "Learned in " in said.out
    assert lines[-1].startswith("Next: safe-region inspect") and "zz" in lines[-1]
    assert "encode" in said.err and "encode" not in said.out
    main([*toy, "--out", str(out), "--quiet"])
    said = capsys.readouterr()
    assert said.err == "" and "Next:" not in said.out and first in said.out
    main([*toy, "--out", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["region"] == str(out) and found["verdict"]["line"] == first and "calibration" in found["numbers"]


def test_a_dry_run_needs_no_out_and_says_how_long(toy, capsys):
    main([*toy, "--dry-run"])
    text = capsys.readouterr().out
    assert re.search(r"^time: (about|a few)", text, re.M)
    counts = re.findall(r"([\d,]+) (?:prompts to|to learn)", text)
    encoded, prompts = (int(count.replace(",", "")) for count in counts)
    assert prompts <= 300 < encoded


def test_the_estimate_is_the_plan_at_the_pace_of_this_machine(monkeypatch):
    # a batch of prompts, some steps of either kind of walls, a training step
    paces = iter((BATCH * 0.5, 10 * 3.0, 10 * 2.0, 3 * 8 * 0.25))

    def seconds(run) -> float:
        run()
        return next(paces)

    monkeypatch.setattr(estimate, "_seconds", seconds)
    recipe = PRESETS["region"]
    trainer = Trainer(ToyBackbone(), parse_pairs(PAIRS), recipe, "bad things")
    expected = 0.5 * plan(trainer).encodings + (3.0 + 2.0) * 400 + 0.25 * sum(costs(trainer.stages).values())
    assert BACKWARD == 2 and estimate.run_seconds(trainer) == pytest.approx(expected)


def test_an_interrupt_keeps_what_was_learned(toy, tmp_path, capsys, monkeypatch):
    def interrupted(self, visit):
        self.region = load_region(WEAPONS)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", interrupted)
    out = tmp_path / "r.safetensors"
    assert str(out) in fails(capsys, *toy, "--out", str(out), code=130)
    kept = load_region(out)
    assert kept.parts[0].label == "weapons" and (kept.metadata["family"], kept.metadata["checkpoint"]) == ("demo", "")


def test_an_interrupt_while_the_demo_measures_keeps_the_region(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def trained(self, visit):
        self.region = load_region(WEAPONS)

    monkeypatch.setattr(Trainer, "run", trained)
    monkeypatch.setattr("comfyui_safe_region.evaluation.demo_run.measure_set", interrupted)
    monkeypatch.setattr(Trainer, "_ledger", SimpleNamespace(time=SimpleNamespace(done={"measure": 0})), raising=False)
    error = fails(capsys, "demo", "--out", str(tmp_path / "results"), "--prompts", "1", "--harmless", "1", code=130)
    assert f"The trained region is in {tmp_path / 'results' / 'weapons.safetensors'}" in error
    assert load_region(tmp_path / "results" / "weapons.safetensors").metadata["family"] == "demo"


def test_info_names_the_checkpoint_before_the_class_of_the_model(tmp_path, capsys):
    def learned_on(**about: str) -> str:
        region = replace(load_region(WEAPONS), metadata={"base_model": "SDXL", **about})
        main(["info", str(save_region(region, tmp_path / "r.safetensors"))])
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("learned on"))[12:]

    assert learned_on(family="sdxl", checkpoint="juggernaut.safetensors") == "juggernaut.safetensors (sdxl)"
    assert learned_on(family="sdxl", checkpoint="") == "sdxl" and learned_on() == "SDXL"


def test_where_the_time_went_is_said_the_longest_first():
    spent = {"encode": 12.3, "discover": 40.2, "preview": 3.0, "report": 2.0, "instant": 0.4}
    assert summary({"steps": 60, "seconds": 63.0, "stage_seconds": spent}) == [
        "learned in 63 s (60 steps 40 s, reading prompts 12 s, pictures 5 s)"]  # fmt: skip


@pytest.mark.parametrize("form", ["json", "toml"])
def test_options_come_from_a_file_and_those_that_are_typed_go_first(toy, form, tmp_path, capsys):
    if form == "toml":
        pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    lines = {"pairs": toy[2], "preset": "instant", "prompts": 400, "dry-run": True}
    text = json.dumps(lines) if form == "json" else "\n".join(f"{k} = {json.dumps(v)}" for k, v in lines.items())
    file = tmp_path / f"c.{form}"
    file.write_text(text, encoding="utf-8")
    main(["train", "--config", str(file), "--json"])
    assert 300 < json.loads(capsys.readouterr().out)["prompts"] <= 400
    main(["train", "--config", str(file), "--json", "--prompts", "300"])
    assert json.loads(capsys.readouterr().out)["prompts"] <= 300
    file.write_text(text.replace("preset", "presett"), encoding="utf-8")
    assert '"presett"' in fails(capsys, "train", "--config", str(file))
    file.write_bytes('{"concept": "Messer für"}'.encode("latin-1"))
    assert f"--config FILE: {file} is no UTF-8 text" in fails(capsys, "train", "--config", str(file))


# --- the demo ---


def test_the_report_escapes_and_holds_its_pictures():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    evil = "<script>alert('&')</script>"
    result = SetResult("implicit", 2, 1.0, 0.5, None, 0.0, 9.0, [(evil, red, blue), ("b", red, red)], [False, True])
    counted = {"held_out_unsafe_touched": 0.05, "harmless_touched": 0.0}
    region = Region((), {"name": evil, "recipe": {"seed": 7}, "calibration": counted})
    page = report_page(region, verdict(region.metadata), [result], red, f"safe-region demo --out '{evil}'")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(source.startswith("data:image/") for source in sources)
    assert page.count("Failed:") == 1 and page.index("Useless:") < page.index("<table")
    assert "a crime scene" in page and f"torch {torch.__version__}" in page and "<dd>7</dd>" in page
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", page)) == 5


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(tmp_path, capsys):
    main(["demo", "--out", str(tmp_path), "--preset", "instant", "--prompts", "4", "--harmless", "8"])
    said = capsys.readouterr()
    assert "held-out words" in said.out and "identical to the bit" in said.out and "Learned in" in said.out
    assert "measure, harmless" in said.err
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert set(results) >= {"seen words", "held-out words", "mixed", "harmless"}
    assert load_region(tmp_path / "weapons.safetensors").parts[0].label == "weapons"
    assert (tmp_path / "weapons.safetensors").stat().st_size < 300_000
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("before_after.png", "training.png", "report.html"))

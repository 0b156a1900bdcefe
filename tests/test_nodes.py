"""What can be said about the nodes without ComfyUI; tests/host runs them in a real one."""
from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_safe_region.nodes.names import checkpoint_of, default_name, file_state, inside, safe_name, shown
from comfyui_safe_region.nodes.steering_status import steering_status
from comfyui_safe_region.region import Gate, Part, Region
from comfyui_safe_region.region.inspection import judge
from region_examples import example_move, example_region

ROOT = Path(importlib.import_module("comfyui_safe_region").__file__).parent
NODE_FILES = sorted((ROOT / "nodes").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level modules that a file imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_package_does_nothing_without_comfyui():
    code = (
        "import sys, comfyui_safe_region as p; "
        "assert p.WEB_DIRECTORY and not hasattr(p, 'NODE_CLASS_MAPPINGS'); "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'comfy_api', 'folder_paths', 'torch')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_nodes_and_their_backbone_know_comfyui():
    comfy = {"comfy", "comfy_api", "folder_paths", "server", "comfy_extras"}
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        alone = place == Path("benchmarks/memory.py")  # runs in ComfyUI's interpreter
        allowed = place.parts[0] in ("nodes", "tests") or alone or place.match("backbones/comfy*.py")
        if allowed or place.parts[0].startswith("."):
            continue
        assert not imports(path) & comfy, place


@pytest.mark.parametrize("path", [*NODE_FILES, ROOT / "__init__.py"], ids=lambda p: p.name)
def test_v3_only_and_nothing_forbidden(path: Path):
    text = path.read_text(encoding="utf-8")
    assert "NODE_CLASS_MAPPINGS" not in text, "a V1 mapping would hide every V3 node"
    assert "nodes" not in imports(path), "that is ComfyUI's own module"
    assert not {"subprocess", "requests", "socket"} & imports(path)


def test_every_node_has_a_help_page():
    ids = set()
    for path in NODE_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "node_id" and isinstance(node.value, ast.Constant):
                ids.add(node.value.value)
    assert ids == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert ids


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("my-region", "my-region"),
        ("  my region.safetensors ", "my region"),
        ("../../etc/passwd", "etc/passwd"),
        ("..\\..\\windows\\con", "windows/_con"),
        ("a<b>:|?*c", "a_b_c"),
        ("/absolute", "absolute"),
        ("C:\\x", "C_/x"),
        ("...", ""),
        ("", ""),
        (".hidden", "hidden"),
        ("größe", "größe"),
        ("nul.txt", "_nul.txt"),
    ],
)
def test_safe_name(typed: str, clean: str):
    assert safe_name(typed) == clean


def test_long_names_are_cut():
    assert len(safe_name("x" * 5000)) == 80


def test_another_file_of_the_same_size_and_time_counts_as_changed(tmp_path: Path):
    file, before = tmp_path / "r.safetensors", []
    for content in (b"guard", b"no-op"):
        file.write_bytes(content)
        os.utime(file, ns=(10**18, 10**18))
        before.append(file_state(file))
    assert before[0] != before[1] != file_state(None)


def test_shown_text_has_no_markup():
    text = shown("<img src=x onerror=alert(1)>\n&amp;")
    assert not set("<>&\n") & set(text)
    assert len(shown("x" * 1000)) == 300


def test_inside(tmp_path: Path):
    folder = tmp_path / "input"
    folder.mkdir()
    assert inside(folder, "a/b.txt") == (folder / "a" / "b.txt").resolve()
    assert inside(folder, "../secret.txt") is None
    assert inside(folder, str(tmp_path / "secret.txt")) is None
    try:
        (folder / "link").symlink_to(tmp_path)
    except OSError:
        return  # no links here
    assert inside(folder, "link/secret.txt") is None


def test_a_region_without_a_name_is_called_by_its_concept_and_model():
    region = example_region()
    known = replace(region, metadata={"name": "Weapons & knives", "family": "sdxl"})
    assert default_name(known) == "weapons-knives.sdxl"
    assert default_name(replace(region, metadata={"name": "weapons"})) == "weapons"
    assert default_name(replace(region, metadata={"name": "../x", "family": "../../etc/y"})) == "x.etc-y"
    assert default_name(replace(region, metadata={"name": "武器", "family": "flux"})) == "武器.flux"


def test_the_checkpoint_is_found_behind_nodes_that_patch_the_model():
    prompt = {
        "1": {"inputs": {"ckpt_name": "sdxl/base v1.safetensors"}},
        "2": {"inputs": {"model": ["1", 0], "lora_name": "more.safetensors"}},
        "3": {"inputs": {"model1": ["2", 0], "ratio": 0.5}},
        "4": {"inputs": {"model": ["3", 0], "clip": ["1", 1]}},
        "5": {"inputs": {"model": ["6", 0]}},
        "6": {"inputs": {"model": ["5", 0]}},  # a circle
        "7:1": {"inputs": {"model": ["1", 0]}},  # in a subgraph
        "8": {"inputs": {"model": ["9", 0], "name": "own.safetensors"}},
        "9": {"inputs": {}},
        "10": {"inputs": {"": ["2", 0]}},  # a reroute
        "11": {"inputs": {"model": ["10", 0], "patch_name": "patch.safetensors"}},
        "12": {"inputs": {"model": ["11", 0]}},
    }
    found = {checkpoint_of(prompt, name) for name in ("4", "7:1", "12")}
    assert found == {"base v1.safetensors"}
    assert checkpoint_of(prompt, "5") == checkpoint_of(prompt, "8") == checkpoint_of(None, "1") == ""
    assert checkpoint_of(prompt, None) == ""


def entry(*tokens: float) -> list[Any]:
    return [torch.tensor(tokens)[None, :, None].expand(1, -1, 6).clone(), {}]


def told(text: list[Any], region: Region, strength: float = 1.0, mode: str = "auto", end: float = 1.0):
    first, *others = steering_status(judge([text], region), [text], region, strength, mode, 0.0, end)
    return (*first, *others)


def test_what_apply_says():
    gate = Gate(torch.ones(1, 6), torch.tensor([3.0]), torch.zeros(6), torch.ones(6), torch.tensor(1.0))
    region = Region((Part("weapons", {"cross_attn": example_move(6)}, {"cross_attn": gate}),))
    inside, outside = entry(-1, -1), entry(-1, 1)
    assert told(inside, region) == ("Sees nothing of weapons here: comes out unchanged.", "good")
    assert told(outside, region) == (
        "Sees weapons here: moved. Inspect Safe Region shows which words.", "warn")
    assert told(outside, region, 0.5, end=0.4)[0].startswith(
        "Sees weapons here: moved at strength 0.5, from 0% to 40% of sampling only.")
    assert told(inside, region, 0.0) == ("Switched off: strength 0 moves nothing.", "warn")
    assert told(inside, region, mode="always")[0] == "Moved: mode always moves every prompt."
    free = Region((Part("a", {"cross_attn": example_move(6)}),))
    assert told(inside, free)[0] == "Moved: this region moves every prompt."
    useless = replace(region, metadata={"calibration": {"held_out_unsafe_touched": 0.05, "harmless_touched": 0.0}})
    text, tone, (doubt, worse) = told(inside, useless)
    assert (text, tone, worse) == ("Sees nothing of weapons here: comes out unchanged.", "good", "bad")
    assert doubt.startswith("This region is useless: ")


def test_what_cannot_be_judged_is_not_called_inside():
    gate = Gate(torch.ones(1, 6), torch.tensor([3.0]), torch.zeros(6), torch.ones(6), torch.tensor(1.0))
    region = Region((Part("weapons", {"cross_attn": example_move(6)}, {"cross_attn": gate}),))
    for text in ([], [[None, {}]], [entry(-1, float("nan"))]):
        ((said, _),) = steering_status(judge(text, region), text, region, 1.0, "auto", 0.0, 1.0)
        assert said.startswith("Applied.")

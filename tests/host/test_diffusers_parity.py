"""The same prompt gives the same text in ComfyUI and in the diffusers backbone, so one region serves both."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("SD 1.x", "SDXL", "SD3", "SD3 without T5", "Flux")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("parity") / "report.json"
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    script = Path(__file__).parent / "diffusers_parity.py"
    run = subprocess.run(
        [python, str(script), str(out)], cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_encode_prompts_alike(report, family):
    for prompt, found in report[family]["prompts"].items():
        theirs, ours = found["shapes"]
        assert theirs == ours, prompt
        assert all(difference < 1e-4 for difference in found["largest"].values()), (prompt, found["largest"])
        assert any(size > 0.1 for size in found["size"].values()), "there is something to compare"


@pytest.mark.parametrize("family", FAMILIES)
def test_both_have_one_signature(report, family):
    theirs, ours = report[family]["signatures"]
    assert theirs == ours


@pytest.mark.parametrize("direction", [0, 1], ids=["learned on diffusers", "learned in ComfyUI"])
def test_a_region_of_one_moves_the_same_prompts_in_the_other(report, direction):
    found = report["exchanged"][direction]
    here, there = found["moved"]
    assert here == there and any(here) and not all(here)
    assert found["largest"] < 1e-3
    assert found["encoder"] == report["SD 1.x"]["signatures"][0]

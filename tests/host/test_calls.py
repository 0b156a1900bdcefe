"""Every function of every node takes what ComfyUI gives it: all inputs of the schema, by name."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_functions_take_all_inputs(tmp_path, object_info):
    out = tmp_path / "report.json"
    script = Path(__file__).parent / "call_nodes.py"
    run = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), str(script), str(out)],
        cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) == {name for name in object_info if name.startswith("SafeRegion") or name.endswith("SafeRegion")
                           or name == "TrainBalanceRegion"}  # fmt: skip
    for node, found in report.items():
        assert found.pop("same", True), f"{node} runs again at every Run"
        assert not any(found.values()), (node, found)
    assert sum("fingerprint_inputs" in found for found in report.values()) == 3

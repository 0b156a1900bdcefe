"""A short run of benchmarks/service.py: one server for everybody, against a server that did nothing else."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from host import PACK

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (PACK / "demo" / "regions" / "demo-weapons.safetensors").exists(), reason="the example region is not made yet"
)]  # fmt: skip


def script() -> Any:
    spec = importlib.util.spec_from_file_location("service", PACK / "benchmarks" / "service.py")
    module = sys.modules["service"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_service_draws_what_a_new_server_draws(comfy: Any, tmp_path: Path):
    service = script()
    fresh = service.started(tmp_path / "fresh")
    try:
        done = service.serve(fresh, comfy, prompts=40, every=20)
    finally:
        fresh.stop()
    assert (done.prompts, done.trained, done.interrupted) == (40, 2, 4) and done.swapped > 2
    assert not done.wrong
    assert done.slope() < 5, "MB a prompt"

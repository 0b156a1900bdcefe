"""Tests in a real ComfyUI: set COMFYUI_PATH to its tree, and COMFYUI_PYTHON to an interpreter that can run it."""
from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("host")  # pytest's importlib mode does not put this folder on the path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tree = os.environ.get("COMFYUI_PATH")
    reason = None if tree else "set COMFYUI_PATH to a ComfyUI tree to run the tests in a real ComfyUI"
    if tree and not (Path(tree) / "main.py").is_file():
        raise pytest.UsageError(f"COMFYUI_PATH={tree} holds no main.py")
    for item in items:
        if reason and HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all tests of a session."""
    from host import Host, prepare_base

    base = tmp_path_factory.mktemp("comfyui")
    prepare_base(base)
    server = Host(
        Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base,
        os.environ.get("COMFYUI_FRONTEND"),
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="session")
def object_info(comfy: Any) -> dict[str, Any]:
    return comfy.get("/object_info")

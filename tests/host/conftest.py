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


# pytest's importlib mode does not put this folder on the path
for _name in ("host", "browser", "drawing", "examples", "pictures"):
    _load(_name)


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
    from host import Host, complaints, prepare_base

    base = tmp_path_factory.mktemp("comfyui")
    prepare_base(base)
    server = Host(
        Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base,
        os.environ.get("COMFYUI_FRONTEND"),
    )  # fmt: skip
    yield server
    server.stop()
    assert complaints(server.log()) == []


@pytest.fixture(scope="session")
def object_info(comfy: Any) -> dict[str, Any]:
    return comfy.get("/object_info")


@pytest.fixture(scope="session")
def page_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with the whole frontend, for the browser, with the pack in a folder whose files it can ask for."""
    from browser import missing_browser
    from host import Host, complaints, prepare_base

    if reason := missing_browser():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("comfyui_page")
    prepare_base(base, "safe-region")
    recipe = base / "custom_nodes" / "safe-region" / "training" / "recipe.py"
    fewer = recipe.read_text(encoding="utf-8").replace("trajectories: int = 96", "trajectories: int = 16")
    recipe.write_text(fewer, encoding="utf-8")  # pages only show training; how well it learns is tested elsewhere
    server = Host(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base,
                  os.environ["COMFYUI_FRONTEND"])  # fmt: skip
    yield server
    server.stop()
    assert complaints(server.log()) == []


@pytest.fixture(scope="session")
def chromium(page_host: Any) -> Iterator[Any]:
    from browser import CHROMIUM, QUIET
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def comfy_page(request: pytest.FixtureRequest, page_host: Any, chromium: Any) -> Iterator[Any]:
    """An open page, once with the classic canvas and once with Nodes 2.0. At its end nothing of ours went wrong."""
    from browser import ComfyPage

    page = chromium.new_page(viewport={"width": 1600, "height": 1000})
    opened = ComfyPage(page_host, page, request.param)
    yield opened
    page.close()
    assert not opened.complaints()

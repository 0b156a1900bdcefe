"""What pip installs is what the repository holds."""
from __future__ import annotations

from pathlib import Path

import pytest

import comfyui_safe_region

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}


def settings() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_code_is_a_package_that_pip_installs():
    listed = settings()["tool"]["setuptools"]["packages"]
    inits = ROOT.glob("*/**/__init__.py")
    folders = (path.parent.relative_to(ROOT) for path in inits)
    found = {folder.parts for folder in folders if not folder.parts[0].startswith(".")}
    found = {parts for parts in found if parts[0] not in NOT_SHIPPED and not parts[0].endswith("-info")}
    assert sorted(listed) == sorted(["comfyui_safe_region", *(".".join(("comfyui_safe_region", *p)) for p in found)])


def test_the_installed_package_has_its_data():
    here = Path(comfyui_safe_region.__file__).parent
    wanted = [ROOT / "py.typed"]
    for pattern in ("demo/*.txt", "demo/weights/*", "demo/regions/*", "training/*.txt", "training/packs/**/*",
                    "web/**/*", "example_workflows/*", "subgraphs/*"):
        wanted += [path for path in ROOT.glob(pattern) if path.is_file()]
    missing = [str(path.relative_to(ROOT)) for path in wanted if not (here / path.relative_to(ROOT)).is_file()]
    assert not missing


def test_versions_are_lower_bounds_only():
    project = settings()["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert not [one for one in wanted if any(sign in one for sign in ("==", "<", "~=", "!="))]
    assert "comfyui" not in project["name"].lower(), "the registry does not take it in a name"

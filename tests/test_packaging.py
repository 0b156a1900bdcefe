"""What pip installs and what the Comfy registry is sent is what the repository holds; docs/registry.md tells of it."""
from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

import comfyui_safe_region

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""
ICON = "docs/images/icon.png"
# The two names that only the owner knows, as they stand until then.
PUBLISHER_ID, OWNER = "PUBLISHER-ID-TO-BE-SET", "PUBLISHER"
VERSION_BOUND = r"(==|>=|<=|!=|~=|>|<|<>|=)?\s*\d+\.\d+\.\d+"  # as the registry's own tool reads them


def settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names_to_set(found: dict[str, Any]) -> list[str]:
    """What the owner still has to write into pyproject.toml, in words."""
    comfy = found["tool"]["comfy"]
    addresses = [*found["project"]["urls"].values(), comfy["Icon"]]
    wanted = {
        "PublisherId, the name after the @ on your page of the registry": comfy["PublisherId"] == PUBLISHER_ID,
        f"the repository's owner, in place of {OWNER} in its addresses": any(f"/{OWNER}/" in one for one in addresses),
    }
    return [words for words, missing in wanted.items() if missing]


def shipped() -> set[str]:
    """Every file of the packages and of their data, from the repository's root."""
    files = (path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = {path.relative_to(ROOT) for path in files}
    inside = {name for name in names if len(name.parts) > 1 and name.parts[0] not in NOT_SHIPPED
              and not name.parts[0].startswith(".") and not name.parts[0].endswith("-info")}  # fmt: skip
    return {name.as_posix() for name in inside} | {"__init__.py", "py.typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names in a wheel and in an sdist made of the repository, from its root."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    made = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=folder / "tree", capture_output=True, text=True
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    return inside, source


def test_every_folder_of_code_is_a_package_that_pip_installs():
    listed = settings()["tool"]["setuptools"]["packages"]
    inits = ROOT.glob("*/**/__init__.py")
    folders = (path.parent.relative_to(ROOT) for path in inits)
    found = {folder.parts for folder in folders if not folder.parts[0].startswith(".")}
    found = {parts for parts in found if parts[0] not in NOT_SHIPPED and not parts[0].endswith("-info")}
    assert sorted(listed) == sorted(["comfyui_safe_region", *(".".join(("comfyui_safe_region", *p)) for p in found)])


def test_the_installed_package_has_its_data():
    here = Path(comfyui_safe_region.__file__).parent
    missing = [name for name in shipped() if not name.endswith(".py") and not (here / name).is_file()]
    assert not missing


def test_a_wheel_holds_the_packages_and_their_data_and_nothing_else(built):
    inside, _ = built
    package = {name.removeprefix("comfyui_safe_region/") for name in inside if ".dist-info/" not in name}
    assert package == shipped()
    about = {PurePosixPath(name).name for name in inside if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "METADATA", "entry_points.txt"} <= about


def test_an_sdist_holds_what_a_wheel_is_made_of(built):
    _, source = built
    assert shipped() | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= source
    assert not [name for name in source if name.startswith(("benchmarks/", ".ci/"))]


def test_the_registrys_archive_leaves_out_nothing_that_is_needed():
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = [line for line in lines if line and not line.startswith("#")]
    assert {"/tests/", "/benchmarks/"} <= set(left_out)
    assert all(re.fullmatch(r"/[\w.]+/?", line) for line in left_out), "a name in the root alone, not web/docs for docs"
    needed = shipped() | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert not [name for name in needed if f"/{name}".startswith(tuple(left_out))]


def test_versions_are_lower_bounds_only():
    project = settings()["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert not [one for one in wanted if any(sign in one for sign in ("==", "<", "~=", "!="))]


def test_the_registry_is_told_everything_but_the_owners_two_names():
    found = settings()
    project, comfy = found["project"], found["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z](?:[-_.]?[A-Za-z0-9])+", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower(), "the registry does not take it in a name"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]), "it knows no other versions"
    assert (ROOT / project["license"]["file"]).is_file() and project["description"] and comfy["DisplayName"]
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert all(re.fullmatch(VERSION_BOUND, part.strip()) for part in comfy["requires-comfyui"].split(","))
    urls = project["urls"]
    assert {"Repository", "Documentation", "Bug Tracker"} <= urls.keys()
    assert all(url.startswith(urls["Repository"]) for url in urls.values()), "one repository"
    place = urlsplit(comfy["Icon"])
    assert place.netloc == "raw.githubusercontent.com"
    assert place.path == f"{urlsplit(urls['Repository']).path}/main/{ICON}"
    if missing := names_to_set(found):
        warnings.warn(f"Before the pack can be published, pyproject.toml wants {'; and '.join(missing)}.", stacklevel=1)


def test_the_owners_names_are_seen_when_they_are_set():
    icon, here, there = "https://raw.githubusercontent.com/some/repo/main/icon.png", f"/{OWNER}/repo", "/some/repo"
    found = {"project": {"urls": {"Repository": there}}, "tool": {"comfy": {"PublisherId": "somebody", "Icon": icon}}}
    assert names_to_set(found) == []
    found["project"]["urls"]["Repository"] = here
    assert len(names_to_set(found)) == 1
    found["tool"]["comfy"]["PublisherId"] = PUBLISHER_ID
    assert len(names_to_set(found)) == 2


def test_the_icon_is_as_the_registry_wants_it():
    assert Image.open(ROOT / ICON).size == (400, 400)
    assert (ROOT / ICON).stat().st_size <= 60_000 and (ROOT / ICON).with_suffix(".svg").is_file()


@pytest.mark.parametrize("name", sorted(name for name in shipped() if name.endswith(".py")))
def test_nothing_that_the_registrys_scanner_refuses(name: str):
    """No code from text, no other programs, no packages installed, several statements in no line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    reached = {f"{node.value.id}.{node.attr}" for node in nodes
               if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}  # fmt: skip
    assert not {one for one in reached if re.match(r"os\.(system|popen|exec|spawn)|subprocess\.(?!list2cmdline)", one)}
    bodies = [body for node in nodes for body in (getattr(node, "body", None), getattr(node, "orelse", None))]
    lines = [statement.lineno for body in bodies if isinstance(body, list) for statement in body]
    assert len(lines) == len(set(lines))

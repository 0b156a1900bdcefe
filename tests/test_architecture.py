"""The house: no import goes upwards, none in a circle, and the picture of it is as the code is."""

from __future__ import annotations

import importlib.util
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
NOT_OURS = {"tests", "docs", "build", "dist"}


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graph(architecture) -> dict[str, set[str]]:
    return architecture.graph()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one once more at the end; none where there is no circle.

    Raises nothing: of several circles it finds one.
    """
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_goes_upwards(architecture, graph):
    assert architecture.upward(graph) == []


def test_no_modules_import_one_another_in_a_circle(graph):
    assert circle(graph) == []


def test_every_folder_of_code_has_its_floor(architecture, graph):
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")} - NOT_OURS
    assert {folder for folder in folders if not folder.startswith(".")} == set(architecture.FLOORS) - {""}


def test_every_way_of_importing_is_seen(architecture, tmp_path):
    for name, content in {
        "__init__.py": "def entry():\n    from .nodes.train import TrainNode",
        "nodes/__init__.py": "",
        "nodes/train.py": "from ..training import learner, other\nimport torch",
        "training/__init__.py": "",
        "training/learner.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import Plan",
        "training/plan.py": "def plan():\n    from . import learner\n    from ..nodes.train import TrainNode",
        "region/__init__.py": "from .region import Region",
        "region/region.py": "",
        "benchmarks/kept.py": "from comfyui_safe_region.region import Region\nimport comfyui_safe_region.training.plan",
        "benchmarks/balance.py": "from kept import keep",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = architecture.graph(tmp_path)
    assert found == {
        "": {"nodes.train"}, "nodes": set(), "nodes.train": {"training", "training.learner"},
        "training": set(), "training.learner": {"training.plan"},
        "training.plan": {"training.learner", "nodes.train"}, "region": {"region.region"}, "region.region": set(),
        "benchmarks.kept": {"region", "training.plan"}, "benchmarks.balance": {"benchmarks.kept"},
    }  # fmt: skip
    assert architecture.upward(found) == ["training.plan imports nodes.train"]
    assert {"training.plan", "training.learner"} <= set(circle(found))
    assert architecture.upward({"nodes.a": {"cli.b"}}) == ["nodes.a imports cli.b"], "side by side is not below"


def test_the_picture_is_as_the_code_is(architecture, graph):
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert drawn == architecture.drawing(graph), "draw it anew: python docs/architecture.py"


def test_a_prompt_goes_through_modules_that_are_there(architecture, graph):
    with pytest.raises(ValueError, match=r"training\.walls"):
        architecture.drawing({name: others for name, others in graph.items() if name != "training.walls"})

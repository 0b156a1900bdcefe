"""The pack in a real page, in both renderers: the example workflows, and what the nodes show."""

from __future__ import annotations

import pytest
from host import PACK

EXAMPLES = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "train" not in name])
def test_examples_open_and_run(comfy_page, name):
    comfy_page.example(name)
    history = comfy_page.run()
    assert history["status"]["status_str"] == "success"

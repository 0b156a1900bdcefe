from pathlib import Path

import pytest

try:
    import comfyui_safe_region
except ImportError as error:
    raise pytest.UsageError(f'{error}. Install the package first: python -m pip install -e ".[test]"') from None


def pytest_report_header() -> str:
    return f"testing the package in {Path(comfyui_safe_region.__file__).parent}"

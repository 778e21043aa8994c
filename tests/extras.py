"""Modules of tests that need an extra of the project are skipped where it is not installed."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def need(extra: str) -> None:
    """Skip the module that calls this unless all that the extra names is installed."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = re.match(r"[\w.-]+", requirement)[0]
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            reason = f'needs {name}: pip install -e ".[{extra}]"'
            pytest.skip(reason, allow_module_level=True)

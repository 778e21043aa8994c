"""Modules of tests that need an extra of the project are skipped where it is not installed."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def names(extra: str) -> list[str]:
    """Of the distributions that an extra installs."""
    return [re.match(r"[\w.-]+", x)[0] for x in PROJECT["optional-dependencies"][extra]]


def need(extra: str) -> None:
    """Skip the module that calls this unless all that the extra names is installed."""
    for name in names(extra):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            reason = f'needs {name}: pip install -e ".[{extra}]"'
            pytest.skip(reason, allow_module_level=True)

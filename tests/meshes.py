"""Meshes of several devices; a test that asks for one is skipped where there are fewer."""

import math
from collections.abc import Sequence

import jax
import pytest
from jax.sharding import AxisType, Mesh


def make(sizes: Sequence[int], names: Sequence[str], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the first devices, all of its axes of one type."""
    needed, devices = math.prod(sizes), jax.devices()
    if len(devices) < needed:
        pytest.skip(f"needs {needed} devices, {devices[0].platform} has {len(devices)}")
    return jax.make_mesh(sizes, names, (axis_type,) * len(sizes), devices=devices[:needed])

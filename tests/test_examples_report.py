"""The picture that the scripts leave."""

import itertools

import extras
import numpy as np
import pytest

extras.need("examples")

import matplotlib.pyplot as plt
from matplotlib import image

from florax_examples import report


def test_names_of_close_points_are_apart_and_inside():
    figure, axes = plt.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    ends = {f"run {i}": (0.9, 0.01 * i, "black") for i in range(6)} | {"far": (0.1, 0.02, "black")}
    report.label(axes, ends)
    places = {text.get_text(): text.xy for text in axes.texts}
    assert places["far"] == (0.1, 0.02)
    heights = [places[f"run {i}"][1] for i in range(6)]
    assert heights[0] > 0 and heights[-1] < 1
    assert all(b - a > 0.04 for a, b in itertools.pairwise(heights))
    assert axes.get_xlim()[1] > 1.1  # room for what is written
    plt.close(figure)


@pytest.mark.parametrize("methods, panels", [(("flora",), 1), (("none", "flora"), 2)])
def test_of_several_runs_the_bytes_are_drawn_too(methods, panels, tmp_path):
    losses = [(n, 1 / (1 + n)) for n in range(10)]
    runs = [
        {"method": name, "test_loss": 0.1, "optimizer_bytes": 2**20, "accumulator_bytes": i}
        for i, name in enumerate(methods)
    ]
    curves = dict.fromkeys(methods, report.Curve(losses, losses))
    report.plot(curves, runs, tmp_path / "loss.png", "token", "Translation")
    height, width, _ = np.shape(image.imread(tmp_path / "loss.png"))
    assert (width > 2 * height) == (panels == 2)

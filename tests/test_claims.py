"""What the pages conclude from the results: verdicts that turn with the figures, and pictures."""

import json
from pathlib import Path

import extras
import pytest

extras.need("examples")

from florax_benchmarks import claims, pages, paper, plots, tables


def write(folder, sweep, losses, share=None):
    """Rows of a sweep: of each variant the losses of its seeds; bytes are thousandths."""
    with (folder / "quality.jsonl").open("a") as file:
        for name, own in losses.items():
            settings = {"task": sweep.task, "variant": name, "resample_every": 100}
            row = {
                "settings": settings | dict(sweep.changes),
                "losses": own,
                "scores": {"rougeL": [30.0], "BLEU": [20.0]},
                "parameter_bytes": 1000,
                "accumulator_bytes": 0,
                "optimizer_bytes": (share or {}).get(name, 1000),
                "learning_rate": 1e-3,
                "update_ms": 1.0,
            }
            file.write(json.dumps(row) + "\n")


def verdicts(folder):
    """By claim, of the table of claims."""
    lines = [line.split("|")[1:-1] for line in claims.block(folder).splitlines()[2:]]
    return {claim.strip(): holds.strip() for claim, _, holds, _ in lines}


def test_a_block_ends_at_its_own_end():
    """Also one that has nothing in it yet."""
    text = "<!-- results: {} -->\n<!-- end -->\n\nbetween\n\n"
    text = text.format("scaling-assumptions") + text.format("scaling-assumptions")
    filled = pages.fill(text, Path())
    assert filled.count("between") == 2
    assert filled.count("Assumed") == 2
    assert pages.fill(filled, Path()) == filled


(VISION,) = paper.sweeps("5")
BYTES = {"none": 10, "none+float32": 1000, "none+24-int8": 50, "none+96-int8": 150}
NONE = "with residual no rank is worse than no momentum"
FULL = "with residual the best rank is no worse than full size"
EDGE = "florax has the least loss for its bytes, below 1/8 of the parameters'"


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        (2.4, 2.1, ("yes", "yes", "yes")),
        (2.52, 2.1, ("yes", "yes", "**no**")),  # within the seeds of `none`, but `none` is less
        (2.8, 2.1, ("**no**", "yes", "**no**")),
        (2.4, 2.3, ("yes", "**no**", "yes")),
    ],
)
def test_what_is_said_of_the_residual_follows_from_the_losses(few, many, expected, tmp_path):
    losses = {
        "none": [2.4, 2.5, 2.6],
        "none+float32": [2.2] * 3,
        "none+24-int8": [few] * 3,
        "none+96-int8": [many] * 3,
    }
    write(tmp_path, VISION, losses, BYTES)
    found = verdicts(tmp_path)
    assert (found[NONE], found[FULL], found[EDGE]) == expected


def test_a_rival_with_as_few_bytes_and_less_loss_takes_the_edge(tmp_path):
    losses = {"none": [2.5], "none+float32": [2.2], "none+24-int8": [2.4], "adamw/none": [2.3]}
    write(tmp_path, VISION, losses, BYTES | {"adamw/none": 50})
    assert verdicts(tmp_path)[EDGE] == "**no**"
    write(tmp_path, VISION, losses, BYTES | {"adamw/none": 51})
    assert verdicts(tmp_path)[EDGE] == "yes"


def test_a_table_takes_no_row_of_another_kappa(tmp_path):
    (sweep,) = paper.sweeps("6")
    write(tmp_path, sweep, {"none+128-paper": [4.0]})
    other = paper.Sweep(sweep.task, ("none+128-paper",), {"resample_every": 10})
    write(tmp_path, other, {"none+128-paper": [5.0]})
    assert claims.rows_of(tmp_path, sweep)["none+128-paper"]["losses"] == [4.0]
    rows = [claims.rows_of(tmp_path, own)["none+128-paper"] for own in (sweep, other)]
    assert [line.split("|")[2].strip() for line in tables.quality(rows).splitlines()[2:]] == [
        "10",
        "100",
    ]


def test_what_diverges_is_said_so_in_table_and_picture(tmp_path):
    for sweep in paper.OTHERS["3"]:
        kappa = sweep.changes["resample_every"]
        losses = {
            name: [float("nan") if name.endswith("paper") and kappa < 10 else 4.0] * 3
            for name in sweep.variants
        }
        write(tmp_path, sweep, losses)
    rows = [r for own in paper.OTHERS["3"] for r in claims.rows_of(tmp_path, own).values()]
    (line,) = [line for line in tables.quality(rows).splitlines() if "diverges" in line]
    assert "128-paper" in line and "nan" not in line
    plots.kappas(rows, tmp_path / "kappa.png")
    assert (tmp_path / "kappa.png").stat().st_size > 1000


_, T5 = paper.sweeps("1a")
GROWS = "FLORA: quality grows with the rank"
NEAR = "FLORA: the largest rank is within {} of full size"


@pytest.mark.parametrize(
    ("top", "full", "expected"),
    [(4.5, 4.45, ("yes", "yes")), (4.5, 4.3, ("yes", "**no**")), (4.9, 4.85, ("**no**", "yes"))],
)
def test_of_losses_less_is_better(top, full, expected, tmp_path):
    """The seeds' losses are 0.1 apart."""

    def around(mean):
        return [mean - 0.05, mean, mean + 0.05]

    losses = {"float32": around(full), "64-paper": around(4.6), "128-paper": around(top)}
    write(tmp_path, T5, losses)
    found = verdicts(tmp_path)
    assert (found[GROWS], found[NEAR.format(0.1)]) == expected


def test_only_the_largest_rank_of_the_table_is_the_largest(tmp_path):
    write(tmp_path, T5, {"float32": [4.4], "16-paper": [4.7], "64-paper": [4.6]})
    assert GROWS in verdicts(tmp_path)
    assert not any("the largest rank" in claim for claim in verdicts(tmp_path))


_, FRONTIER = paper.sweeps("frontier")
FEW = "half of the width in 4 bits, of both buffers, is as good as full size"


@pytest.mark.parametrize(
    ("few", "rival", "expected"),
    [(2.3, 2.5, ("yes", "yes")), (2.4, 2.5, ("**no**", "yes")), (2.3, 2.2, ("yes", "**no**"))],
)
def test_the_frontier_is_of_what_accumulates(few, rival, expected, tmp_path):
    losses = {
        "none": [2.1],
        "float32+float32": [2.3],
        "288-both-int4+288-int4": [few],
        "72-both-int4+72-int4": [2.4],
        "72-paper+72-paper": [rival],
    }
    share = {"none": 1, "288-both-int4+288-int4": 180, "72-both-int4+72-int4": 90}
    write(tmp_path, FRONTIER, losses, share | {"72-paper+72-paper": 90})
    found = verdicts(tmp_path)
    assert (found[FEW], found[EDGE]) == expected

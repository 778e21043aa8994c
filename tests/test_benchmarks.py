"""What the benchmarks rest on: variants, baselines, sweeps, and figures that come from results."""

import functools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

extras.need("examples")

import tyro

import florax
import quality
import reproduce_all
from florax_benchmarks import baselines, pages, paper, plots, results, sweep, tasks, variants

# Figures.


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_of_the_readmes_are_those_of_the_results(page):
    text = (results.REPOSITORY / page).read_text()
    assert pages.BLOCK.search(text)
    assert pages.fill(text, results.FOLDER) == text, "run: python benchmarks/report.py --write"


def test_a_row_is_measured_again_only_where_its_program_or_its_place_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORAX_DEVICE", "here")
    measured = []

    def row(program, device="here"):
        def measure(known):
            if known == program:
                return None
            measured.append((program, device))
            return {"program": program, "figure": len(measured)}

        monkeypatch.setenv("FLORAX_DEVICE", device)
        return results.get_of_program(tmp_path, "bench", {"x": 1}, measure)["figure"]

    assert [row("a"), row("a"), row("b"), row("b"), row("b", "there"), row("b", "there")] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert measured == [("a", "here"), ("b", "here"), ("b", "there")]


def test_a_failure_is_a_row_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORAX_DEVICE", "here")
    outcomes = [{"error": "no memory"}, {"program": "a", "figure": 1}]

    def measure(known):
        assert known is None
        return outcomes.pop(0)

    rows = [results.get_of_program(tmp_path, "bench", {}, measure) for _ in range(2)]
    assert "error" in rows[0] and rows[1]["figure"] == 1
    assert len(results.read(tmp_path, "bench")) == 2


def test_what_diverged_is_read_as_it_was_measured_from_lines_that_any_reader_of_json_takes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FLORAX_DEVICE", "here")
    figures = {"losses": [np.nan, 2.5], "sweep": [[np.nan], [1.0, np.inf]], "mean": np.nan, "n": 3}
    results.get(tmp_path, "bench", {"model": None, "rates": [0.5]}, lambda: figures)

    def refuse(constant):
        raise ValueError(constant)

    line = (tmp_path / "bench.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["losses"] == [None, 2.5]
    row = results.latest(tmp_path, "bench", {"model": None, "rates": [0.5]})
    assert_array_equal(row["losses"], [np.nan, 2.5])
    assert_array_equal(row["sweep"][1], [1.0, np.nan])
    assert row["mean"] is None and row["n"] == 3


@pytest.mark.parametrize("file", sorted(results.FOLDER.glob("*.jsonl")), ids=lambda x: x.stem)
def test_published_rows_are_json_to_strict_readers(file):
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()


def test_a_fingerprint_is_of_the_program_alone():
    def f(x):
        return jnp.sin(x) * 2

    def g(y):
        twice = 2
        return jnp.sin(y) * twice

    def fingerprint(f, size=3):
        return results.fingerprint(jax.jit(f).lower(jnp.zeros(size)))

    g.__name__ = "f"  # the module's name is the function's
    assert fingerprint(f) == fingerprint(g)
    assert fingerprint(f) != fingerprint(f, 4)


# Variants.


@pytest.mark.parametrize(
    "name, expected",
    [
        ("none", (None, None)),
        ("float32+float32", ((None, "full", "float32"), (None, "full", "float32"))),
        ("64-paper", ((64, "paper", "float32"), None)),
        ("64-both-int4+32-int8", ((64, "both", "int4"), (32, "smaller", "int8"))),
        ("none+16-paper", (None, (16, "paper", "float32"))),
    ],
)
def test_a_name_says_how_buffers_are_kept(name, expected):
    v = variants.parse(name)
    assert (v.base, v.accumulator, v.momentum) == ("adafactor", *expected)


@pytest.mark.parametrize(
    "name", ["", "int16", "both-int8", "64", "8/none", "sgd/none", "none+64-both-int8",
             "none+int8", "adamw/none+float32", "lora/none", "64-paper-int8"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="got"):
        variants.parse(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("none", "none"),
        ("int8", "full size"),
        ("bfloat16+float32", "full size"),
        ("none+128-int8", "florax, one side"),
        ("int4+128-int4", "florax, accumulator of full size"),
        ("128-both-int4+128-int4", "florax, both sides"),
        ("128-paper+128-paper", "FLORA as published"),
        ("unfactored-lora-8/float32", "LoRA"),
        ("apollo-mini/float32", "APOLLO"),
    ],
)
def test_pictures_call_a_variant_by_its_accumulator(name, expected):
    assert plots.family(name) == expected


def test_all_variants_of_the_papers_tables_have_names():
    for experiment in paper.EXPERIMENTS:
        for own in paper.sweeps(experiment):
            assert own.task in tasks.SHIPPED
            for name in own.variants:
                assert plots.family(name) in plots.FAMILIES
            assert len(set(own.variants)) == len(own.variants)


# Baselines.


@pytest.mark.slow
def test_apollo_scales_rows_by_what_adam_does_to_a_sketch():
    key, rank = jax.random.key(3), 4
    params = {"w": jnp.ones((6, 9)), "b": jnp.ones(6)}
    grads = [draws.normal_like(i, params) for i in range(3)]
    tx = baselines.apollo(0.1, rank, lambda path, leaf: leaf.ndim == 2, key)
    state, adam = tx.init(params), optax.adam(0.1)
    adam_state = adam.init(params)
    own = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    projection = np.asarray(jax.random.normal(own, (6, rank)), np.float64) / 2
    first, second, norm = 0.0, 0.0, None
    for i, g in enumerate(grads):
        updates, state = tx.update(g, state, params)
        expected, adam_state = adam.update(g, adam_state, params)
        assert_allclose(updates["b"], expected["b"], rtol=1e-6)

        wide = np.asarray(g["w"], np.float64).T
        sketch = wide @ projection
        first, second = 0.9 * first + 0.1 * sketch, 0.999 * second + 0.001 * sketch**2
        own = first / (1 - 0.9 ** (i + 1)) / (np.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-6)
        scaled = wide * (np.linalg.norm(own, axis=1) / np.linalg.norm(sketch, axis=1))[:, None]
        now = np.linalg.norm(scaled)
        if norm is not None and now > 1.01 * norm:
            scaled, now = scaled * 1.01 * norm / now, 1.01 * norm
        norm = now
        assert_allclose(updates["w"], -0.1 * scaled.T, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, None], ids=["APOLLO", "Mini"])
def test_apollo_takes_stacked_matrices_one_by_one(rank):
    w = draws.normal(0, 3, 8, 5)
    key = jax.random.key(0)
    tx = baselines.apollo(0.1, rank, lambda path, leaf: leaf.ndim > 1, key)
    together, _ = tx.update({"w": w}, tx.init({"w": w}), {"w": w})
    own = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    projections = np.asarray(jax.random.normal(own, (3, 5, rank or 1)))
    # After one step Adam's part has entries of ±1, whatever the projection is.
    for layer, updates, p in zip(w, together["w"], projections, strict=True):
        sketch = np.asarray(layer) @ (p / np.sqrt(rank or 1))
        axis = None if rank is None else 1
        scale = np.sqrt(sketch.size if rank is None else rank) / np.linalg.norm(sketch, axis=axis)
        scale = scale * np.sqrt(128) if rank is None else scale[:, None]
        assert_allclose(updates, -0.1 * np.asarray(layer) * scale, rtol=1e-3)


def test_adapters_begin_at_the_parameters_and_train_all_but_matrices():
    params = {
        "layers": {"up": jnp.ones((2, 6, 8)), "norm": jnp.ones((2, 6))},
        "embed": jnp.ones((9, 6)),
    }
    own = baselines.adapt(params, 3, lambda path, leaf: path[-1].key == "up", jax.random.key(0))
    assert jax.tree.structure(own.merge(own.trained, own.frozen)) == jax.tree.structure(params)
    jax.tree.map(assert_array_equal, own.merge(own.trained, own.frozen), params)
    shapes = jax.tree.map(jnp.shape, own.trained["adapters"])
    assert shapes == {"['layers']['up']": {"a": (2, 6, 3), "b": (2, 3, 8)}}
    assert own.trained["rest"].keys() == {"['embed']", "['layers']['norm']"}
    w, a, b = (draws.normal(i, *s) for i, s in enumerate([(6, 8), (6, 3), (3, 8)]))
    x = jnp.ones((4, 6))
    assert_allclose(x @ baselines.Factored(w, a, b), x @ (w + a @ b), rtol=1e-5, atol=1e-5)


# Tasks.


def test_what_is_taken_out_of_a_row_is_what_is_to_be_filled_in():
    class Tokenizer:
        pad, eos = 0, 1

    ids = np.arange(2, 130).reshape(1, 128).repeat(20, 0)
    rows = tasks.corrupt(ids, Tokenizer, np.random.default_rng(0))
    first_sentinel = tasks.VOCABULARY - 1
    for source, target, row in zip(rows["source"], rows["target"], ids, strict=True):
        assert source[-1] == target[-1] == Tokenizer.eos
        gaps, current = {}, None
        for token in target[:-1]:
            if token > first_sentinel - tasks.SENTINELS:
                current = gaps.setdefault(int(token), [])
            else:
                current.append(token)
        restored = [t for s in source[:-1] for t in gaps.get(int(s), [s])]
        assert_array_equal(restored, row)
        assert sum(map(len, gaps.values())) == 18 and min(map(len, gaps.values())) >= 1
    assert len({tuple(source) for source in rows["source"]}) == 20


# Sweeps.


def toy(updates=6):
    data = {"x": np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)}
    data["y"] = np.tanh(data["x"] @ np.random.default_rng(1).normal(size=(8, 3))).astype(np.float32)

    def init(key, saved):
        keys = jax.random.split(key, 2)
        return {
            "layers": {"up": jax.random.normal(keys[0], (2, 8, 8)) / 3, "scale": jnp.ones((2, 8))},
            "head": jax.random.normal(keys[1], (8, 3)),
        }

    def losses(params, batch):
        def layer(x, w):
            return jnp.tanh(x @ w["up"]) * w["scale"], None

        x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
        own = ((x @ params["head"] - batch["y"]) ** 2).mean(-1)
        return own, jnp.ones(own.shape, bool)

    return tasks.Task(
        init=init,
        losses=losses,
        train=data,
        validation=jax.tree.map(lambda x: x[:10], data),
        test=jax.tree.map(lambda x: x[10:27], data),
        matrices=lambda path, leaf: path[-1].key == "up",
        is_stacked=lambda path, leaf: path[0].key == "layers",
        unit="row",
        micro_batch=2,
        accumulate=3,
        updates=updates,
        learning_rates=(1e-2, 3e-2),
        resample_every=2,
        at_once=4,
    )


class Pretended:
    """In the place of a `Sweep`: its losses are known, the lower the nearer to the best rate."""

    def __init__(self, best, at_once):
        self.task = toy()._replace(
            learning_rates=(0.25, 0.5, 1.0), at_once=at_once, score=lambda rate: {"rate": rate}
        )
        self.lowered, self.bytes, self.best, self.ran, self.seconds = None, {}, best, [], 1.0

    def train(self, runs):
        assert 0 < len(runs) <= self.task.at_once
        self.ran += runs
        losses = [abs(np.log2(run.rate / self.best)) + run.seed / 8 for run in runs]
        return [
            sweep.Outcome(loss, loss + 1, run.rate) for loss, run in zip(losses, runs, strict=True)
        ]


@pytest.mark.parametrize("at_once", [1, 3, 5, 9])
@pytest.mark.parametrize("best", [1 / 8, 1 / 4, 1 / 2, 1.0, 4.0])
def test_the_best_learning_rate_has_all_seeds_and_lies_inside_of_those_tried(
    best, at_once, monkeypatch
):
    monkeypatch.setattr(results, "fingerprint", lambda lowered: "new")
    runs = Pretended(best, at_once)
    row = quality.measure(quality.Settings("bytes", seeds=3), runs, None)
    assert len(set(runs.ran)) == len(runs.ran)
    assert row["learning_rate"] == best
    assert row["scores"] == {"rate": [best] * 3}
    assert row["tried"][0] < best < row["tried"][-1]
    assert {0.25, 0.5, 1.0} <= {*row["tried"]}
    assert row["losses"] == [1.0, 1.125, 1.25]


def test_more_seeds_of_other_rates_only_fill_up():
    def ran(at_once):
        runs = Pretended(0.5, at_once)
        tried = {}
        while new := quality.next_runs(runs.task.learning_rates, 3, tried, at_once):
            tried |= {run: own.validation for run, own in zip(new, runs.train(new), strict=True)}
        return runs.ran

    assert [run.rate for run in ran(1)] == [0.25, 0.5, 1.0, 0.5, 0.5]
    assert len(ran(3)) == 6
    assert len(ran(9)) == 9


def test_where_every_rate_diverges_the_row_says_so(monkeypatch):
    monkeypatch.setattr(results, "fingerprint", lambda lowered: "new")
    runs = Pretended(0.5, 3)
    diverged = sweep.Outcome(np.nan, np.nan, 0.0)
    runs.train = lambda new: [diverged for _ in new]
    row = quality.measure(quality.Settings("bytes", seeds=2), runs, None)
    assert np.isnan(row["losses"]).all()
    assert row["tried"] == [0.25, 0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "float32+float32",
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("none-updates", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_is_its_runs_one_by_one(name):
    task = toy()
    runs = [sweep.Run(rate, seed) for rate in task.learning_rates for seed in range(2)]
    outcomes = sweep.Sweep(task, name, 4).train(runs)
    count = {"none": 18}.get(name, 6)  # updates
    for (peak, seed), outcome in zip(runs, outcomes, strict=True):
        params = task.init(jax.random.key(seed), ())
        order = np.random.default_rng(seed)
        accumulate = 1 if name == "none-updates" else 3
        rows = np.concatenate([order.permutation(40) for _ in range(2)])
        rows = rows[: 6 * 2 * accumulate].reshape(count, -1)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, 1, count)
        opt = optax.adafactor(rate, min_dim_size_to_factor=64, multiply_by_parameter_scale=False)
        if "+" in name:
            opt = optax.chain(opt, optax.ema(0.9, debias=False))
        opt = florax.per_layer(opt, task.is_stacked)
        state = opt.init(params)

        def loss(params, rows):
            return task.losses(params, jax.tree.map(lambda x: jnp.asarray(x)[rows], task.train))[
                0
            ].mean()

        @jax.jit
        def step(params, state, rows, opt=opt):
            updates, state = opt.update(jax.grad(loss)(params, rows), state, params)
            return optax.apply_updates(params, updates), state

        for own in rows:
            params, state = step(params, state, own)
        expected = task.losses(params, task.test)[0].mean()
        # 18 steps at most, whose products of 8 terms round otherwise together: some 1e-5.
        assert_allclose(outcome.test, expected, rtol=1e-4)
        assert_allclose(task.losses(outcome.params, task.test)[0].mean(), outcome.test, rtol=1e-5)


KINDS = (
    *("lora-2/float32+float32", "galore-2/float32"),
    "apollo-2/float32",
    "4-both-int8+4-int8",
    "4-paper", "int4", "bfloat16", "adamw/float32", "apollo-mini/none", "unfactored/3-both-float32",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_variant_learns(name):
    task = toy(40)
    before = task.losses(task.init(jax.random.key(0), ()), task.test)[0].mean()
    runs = sweep.Sweep(task, name, 1)
    assert runs.train([sweep.Run(1e-2, 0)])[0].test < 0.9 * before
    accumulator = runs.bytes["accumulator_bytes"] / runs.bytes["parameter_bytes"]
    assert (accumulator == 0) == name.endswith("/none")
    assert accumulator <= 1


def test_all_that_is_not_there_is_trained_once(tmp_path):
    given = reproduce_all.Settings(experiments=("3", "6"), results=tmp_path)
    made = reproduce_all.jobs(given)
    settings = [tyro.cli(quality.Settings, args=job.command[1:]) for job in made]
    wanted = {
        (name, sweep.changes["resample_every"])
        for experiment in given.experiments
        for sweep in paper.sweeps(experiment)
        for name in sweep.variants
    }
    assert sorted((own.variants[0], own.resample_every) for own in settings) == sorted(wanted)
    for own in settings[1:]:  # as if these had run
        row = {"task": "pretraining", "resample_every": own.resample_every}
        row = {"settings": row | {"variant": own.variants[0]}}
        with (tmp_path / "quality.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert reproduce_all.jobs(given) == made[:1]


def test_weights_that_are_asked_for_are_written_though_their_row_is_there(tmp_path):
    written = []
    task = SimpleNamespace(
        learning_rates=(1.0,),
        at_once=1,
        updates=1,
        score=lambda params: {},
        save=lambda params, folder: written.append((params, folder)),
    )
    runs = SimpleNamespace(
        task=task,
        lowered=SimpleNamespace(as_text=lambda: "program"),
        bytes={},
        seconds=1.0,
        train=lambda runs: [sweep.Outcome(1.0, 1.0, run) for run in runs],
    )
    known = results.fingerprint(runs.lowered)
    given = {"task": "denoising", "seeds": 1}
    assert quality.measure(quality.Settings(**given), runs, known) is None
    assert quality.measure(quality.Settings(**given, save=tmp_path), runs, known)
    assert (sweep.Run(1.0, 0), tmp_path) in written


@pytest.mark.parametrize("fails", [False, True])
def test_rows_wait_for_the_model_that_they_fine_tune(fails, tmp_path, monkeypatch):
    given = reproduce_all.Settings(
        models=tmp_path / "models", experiments=("2a", "5"), results=tmp_path
    )
    first, *others = reproduce_all.jobs(given)
    assert not reproduce_all.Queue([first, *others]).missing()
    assert reproduce_all.Queue(others).missing() == {given.models / "t5"}
    settings = tyro.cli(quality.Settings, args=first.command[1:])
    assert (settings.task, settings.save) == ("denoising", given.models / "t5")
    ran, others_of_no_model = [], {job for job in others if job.model is None}

    def run(job, gpu, left):
        if job == first:
            (given.models / "t5").mkdir(parents=True)
            while others_of_no_model - {*ran}:  # these need not wait; the folder is not whole yet
                time.sleep(0.01)
            if fails:
                (given.models / "t5").rmdir()
        ran.append(job)
        return "so"

    monkeypatch.setattr(reproduce_all, "run", run)
    queue, end = reproduce_all.Queue([first, *others]), time.monotonic() + 60
    with ThreadPoolExecutor(3) as pool:
        [*pool.map(functools.partial(reproduce_all.work, queue, end=end), range(3))]
    assert {*ran[: ran.index(first)]} == others_of_no_model
    assert {*ran} == {job for job in (first, *others) if not (fails and job.model)}
    if not fails:
        assert reproduce_all.jobs(given) == others


@pytest.mark.parametrize(
    ("code", "limit", "told"),
    [
        ("print(1)", 600, r"\d+ s"),
        ("raise ValueError('no such thing')", 600, "failed: ValueError: no such thing"),
        ("import time; time.sleep(600)", 0.1, "stopped"),
    ],
)
def test_a_job_says_how_it_ended(code, limit, told):
    assert re.fullmatch(told, reproduce_all.run(reproduce_all.Job("", ("-c", code)), 0, limit))


def test_rows_are_json(tmp_path):
    for file in results.FOLDER.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line).keys() >= {"settings", "conditions", "commit", "command"}

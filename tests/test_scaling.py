"""Bytes on the wire: read from compiled programs, and what a model of links makes of them."""

import itertools
import json
import math

import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

extras.need("examples")

import scaling
from florax_benchmarks import collectives, divided, links, methods, models, predicted
from florax_benchmarks.collectives import Collective
from florax_benchmarks.links import Links, Traffic

# Programs of eight devices that XLA compiles: each collective, and how often it runs.


def shift(x):
    return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])


def scatter(x):
    return jax.lax.psum_scatter(x, "data", tiled=True)


def exchange(x):
    return jax.lax.all_to_all(x, "data", 0, 1, tiled=True)


COLLECTIVES = {  # of x, (16, 24) in float32 on each device: 1,536 bytes
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), 2 * 7 / 8),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data"), 7),
    "reduce-scatter": (scatter, 7 / 8),
    "all-to-all": (exchange, 7 / 8),
    "collective-permute": (shift, 1),
}


def compiled(function, *shapes):
    mesh = divided.mesh_of(8)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    arrays = [jax.ShapeDtypeStruct((8 * rows, *axes), jnp.float32) for rows, *axes in shapes]
    return jax.jit(mapped).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_bytes_are_those_that_enter_a_collective_on_one_device(kind):
    function, share = COLLECTIVES[kind]
    (found,) = collectives.read(compiled(lambda x: function(x).ravel()[None], (16, 24)), 8)
    assert found == Collective(kind, 16 * 24 * 4, 8, 1)
    assert found.sent == pytest.approx(16 * 24 * 4 * share)


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather"])
def test_in_a_loop_they_count_as_often_as_it_runs(kind):
    function, share = COLLECTIVES[kind]

    def looped(x):
        def outer(x, _):
            def inner(x, _):
                return jnp.sin(x + jnp.sum(function(x))), None

            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    found = collectives.read(compiled(looped, (16, 24)), 8)
    assert collectives.by_kind(found) == {kind: {"bytes": 15 * 1536, "count": 15}}
    assert collectives.payload(found) == 15 * 1536
    assert collectives.sent(found) == pytest.approx(15 * 1536 * share)


def test_how_often_a_loop_runs_must_be_known():
    def looped(x):
        def go_on(x):
            return jnp.sum(jax.lax.psum(x, "data")) < 100

        return jax.lax.while_loop(go_on, lambda x: 2 * x, x)

    text = compiled(looped, (16, 24))
    with pytest.raises(ValueError, match=r"the loop .* does not say how often it runs"):
        collectives.read(text, 8)


# What compilers for GPUs write, by hand.

GPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64,4]) -> bf16[8,4] {
  %p = bf16[64,4]{1,0} parameter(0)
  ROOT %scattered = bf16[8,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%quiet (p: f32[10]) -> f32[10] {
  ROOT %p = f32[10]{0} parameter(0)
  %one = f32[1]{0} slice(%p), slice={[0:1]}
  %two = f32[1]{0} all-reduce(%one), replica_groups={}, to_apply=%add
  %three = f32[1]{0} all-reduce(%two), replica_groups={}, to_apply=%add
}

%loud (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %r = f32[10]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%body (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[10]{0} get-tuple-element(%t), index=1
  %which = s32[] constant(0)
  %y = f32[10]{0} conditional(%which, %x, %x), branch_computations={%quiet, %loud}
  ROOT %next = (s32[], f32[10]{0}) tuple(%i, %y)
}

%condition (t: (s32[], f32[10])) -> pred[] {
  %t = (s32[], f32[10]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[10], y: bf16[64,4], z: s8[100]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %y = bf16[64,4]{1,0} parameter(1)
  %z = s8[100]{0} parameter(2)
  %start = (f32[10]{0}, s8[100]{0}) all-reduce-start(%x, /*index=1*/%z), replica_groups={}, to_apply=%add
  %done = (f32[10]{0}, s8[100]{0}) all-reduce-done(%start)
  %gather = ((s8[100]{0}), s8[400]{0}) all-gather-start(%z), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %gathered = s8[400]{0} all-gather-done(%gather)
  %async = ((bf16[64,4]{1,0}), bf16[8,4]{1,0}) async-start(%y), calls=%wrapped
  %awaited = bf16[8,4]{1,0} async-done(%async), calls=%wrapped
  %zero = s32[] constant(0)
  %first = (s32[], f32[10]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[10]{0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = f32[10]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_asynchronous_and_grouped_ones_count_once_and_of_a_conditional_the_larger_branch():
    assert collectives.read(GPU, 8, host=4) == [
        Collective("all-reduce", 140, 8, 1, hosts=2),
        Collective("all-gather", 100, 4, 1, hosts=2),  # devices 0, 2, 4, 6
        Collective("reduce-scatter", 512, 8, 1, hosts=2),
        Collective("all-reduce", 40, 2, 6, hosts=1),
    ]


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("{{0,3},{1,2}}", [0, 3]),
        ("{}", [0, 1, 2, 3]),
        ("[2,2]<=[4]", [0, 1]),
        ("[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("mesh['host'=2,'data'=2] {'host'}", [0, 2]),
        ("mesh['host'=2,'data'=2] {'data'}", [0, 1]),
        ("mesh['host'=2,'data'=2] {'host','data'}", [0, 1, 2, 3]),
    ],
)
def test_groups_are_read_in_every_form(groups, expected):
    assert collectives._group(f"), replica_groups={groups}, channel_id=1", 4) == expected


WIDENED = """
%convert (p: bf16[3,5]) -> f32[3,5] {
  %p = bf16[3,5]{1,0} parameter(0)
  %c = f32[3,5]{1,0} convert(%p)
  ROOT %b = f32[3,5]{1,0} bitcast(%c)
}

ENTRY %main (x: bf16[3,5], y: f32[3,5]) -> f32[3,5] {
  %x = bf16[3,5]{1,0} parameter(0)
  %y = f32[3,5]{1,0} parameter(1)
  %wide = f32[3,5]{1,0} fusion(%x), kind=kLoop, calls=%convert
  ROOT %sum = (f32[3,5]{1,0}, f32[3,5]{1,0}) all-reduce(%wide, %y), replica_groups={}
}
"""


def test_what_is_widened_for_cpus_alone_counts_as_gpus_send_it():
    assert collectives.payload(collectives.read(WIDENED, 2)) == 120
    assert collectives.payload(collectives.read(WIDENED, 2, as_on_gpus=True)) == 90


# Sketches on the wire.

TINY = models.SHAPES["llama-tiny"]


def lower(method, division="data", devices=8, hosts=1, batch=1, accumulate=3):
    mesh = divided.mesh_of(devices // hosts, hosts)
    return divided.lower(method, division, mesh, TINY, jnp.float32, batch, 32, accumulate, 8)


@pytest.mark.slow
def test_what_eight_devices_sum_once_an_update_is_as_large_as_the_sketches():
    program = lower("sketched-once")
    found = collectives.read(program.lowered.compile().as_text(), 8)
    kept = sum(4 * x.size for x in jax.tree.leaves(program.state.sketch.arrays))
    assert collectives.payload(found) == kept + 4  # and the loss
    full = lower("full-once")
    found = collectives.read(full.lowered.compile().as_text(), 8)
    assert collectives.payload(found) == sum(4 * x.size for x in jax.tree.leaves(full.params)) + 4


@pytest.mark.slow
def test_what_they_sum_in_every_micro_batch_is_as_large_too():
    program = lower("sketched")
    found = collectives.read(program.lowered.compile().as_text(), 8)
    kept = sum(4 * x.size for x in jax.tree.leaves(program.state.sketch.arrays))
    assert collectives.payload(found) == 3 * (kept + 4)


@pytest.fixture
def quickly():
    """Without XLA's optimizations, only here: what is counted elsewhere is what they leave."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def trained(program):
    """Losses and parameters of two updates, of the same rows however they are divided."""
    key = jax.random.key(0)
    shardings = jax.tree.map(lambda x: x.sharding, (program.params, program.batches))
    params = models.random_parameters(models.parameter_shapes(TINY, jnp.float32), key)
    batches = jax.tree.map(
        lambda x: jax.random.randint(key, x.shape, 0, TINY.vocabulary), program.batches
    )
    params, batches = jax.device_put((params, batches), shardings)
    state, step = program.init(params), program.lowered.compile()
    losses = []
    for _ in range(2):
        loss, params, state = step(params, state, batches)
        losses.append(float(loss))
    return losses, jax.device_get(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, division",
    [
        ("sketched-once", "data"),
        ("full-once", "data"),
        *itertools.product(("full", "sketched"), ("data", "fsdp", "hybrid")),
    ],
)
def test_however_work_is_divided_the_same_is_learned(method, division, monkeypatch, quickly):
    monkeypatch.setattr(optax, "adafactor", optax.sgd)  # Adafactor hides how gradients are scaled
    monkeypatch.setattr(methods, "LEARNING_RATE", 1.0)
    hosts = 2 if division == "hybrid" else 1
    losses, params = trained(lower(method, division, hosts=hosts))
    alone = lower(method.removesuffix("-once"), devices=1, batch=8)
    expected_losses, expected = trained(alone)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[1] < losses[0]
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        # Sums of float32 products in another order: of gradients up to 1, by some eps.
        np.testing.assert_allclose(x, y, atol=2e-6)


# Links.

SIMPLE = Links(
    devices_of_host=4, within=8.0, across=2.0, reached=0.5, hop_within=1.0, hop_across=10.0
)


def seconds(kind, spans, division, size=96.0, devices=8):
    own = Traffic(kind, spans, "update", size, 0, 1)
    found = links.step([own], division, devices, 1, 0.0, SIMPLE)
    return found.bytes_within, found.bytes_across, found.after


@pytest.mark.parametrize(
    "kind, spans, division, within, across, hops",
    [
        # Two hosts of four: 3/4 within, and a half of a quarter across, there and back.
        ("all-reduce", "all", "data", 2 * 72, 2 * 12, 2 * 3 + 2 * 10),
        # A device keeps its part, of an eighth or of a quarter.
        ("all-reduce", "all", "fsdp", 72, 12, 3 + 10),
        ("all-reduce", "all", "hybrid", 72, 2 * 12, 3 + 2 * 10),
        ("all-reduce", "devices", "hybrid", 72, 0, 3),
        ("all-reduce", "hosts", "hybrid", 0, 2 * 48, 2 * 10),
        # 96 to the other host; then two of these to each of three others.
        ("all-gather", "all", "fsdp", 3 * 2 * 96, 96, 3 + 10),
        ("reduce-scatter", "all", "data", 72, 12, 3 + 10),
        # An eighth to each of three, four to the other host.
        ("all-to-all", "all", "fsdp", 36, 48, 3 + 10),
    ],
)
def test_seconds_are_bytes_over_bandwidths_and_hops(kind, spans, division, within, across, hops):
    assert seconds(kind, spans, division) == (
        pytest.approx(within),
        pytest.approx(across),
        pytest.approx(within / 4 + across / 1 + hops),
    )


def test_on_one_device_nothing_is_sent():
    assert seconds("all-reduce", "all", "data", devices=1) == (0, 0, 0)


def test_what_is_summed_once_waits_for_the_last_micro_batch():
    traffic = [
        Traffic("all-reduce", "devices", "micro-batch", 16, 0, 0),  # 24 bytes: 6 seconds
        Traffic("all-gather", "devices", "update", 0, 16, 0),  # 4 of each part: 12 bytes, 3 s
    ]
    own = links.step(traffic, "hybrid", 4, 5, 2.0, SIMPLE)
    # A hybrid's sums are reduce-scatters: 12 bytes, 3 seconds.
    assert (own.compute, own.inside, own.after) == (10, 15, 3)
    assert (own.apart, own.overlapped) == (28, 18)
    assert links.step(traffic, "hybrid", 4, 5, 4.0, SIMPLE).overlapped == 23


def test_bytes_at_any_number_of_parts_follow_from_two():
    key = ("all-gather", "all", "micro-batch")
    (found,) = scaling.fit({key: (100 + 800 / 8, 3)}, {key: (100 + 800 / 16, 3)}, 8)
    assert found == Traffic(*key, 100, 800, 3)
    assert found.bytes(64) == 112.5


@pytest.mark.slow
@pytest.mark.parametrize("division", ["fsdp", "hybrid"])
@pytest.mark.parametrize("method", ["full", "sketched"])
def test_what_is_compiled_for_few_devices_tells_of_more(division, method):
    def counted(devices, hosts):
        text = lower(method, division, devices, hosts, accumulate=7).lowered.compile().as_text()
        return scaling._traffic(text, division, devices // hosts, hosts)

    if division == "hybrid":  # only the number of hosts differs
        assert counted(4, 2) == counted(8, 4)
        return
    fitted = {own[:3]: own for own in scaling.fit(counted(2, 1), counted(4, 1), 2)}
    for key, (size, _) in counted(8, 1).items():
        assert fitted[key].bytes(8) == pytest.approx(size, abs=512)


def test_a_prediction_stands_beside_what_was_measured(tmp_path):
    case = {"model": "gpt2-tiny", "dtype": "float32", "batch": 1, "length": 32, "rank": 8}
    own = case | {"division": "data", "accumulate": 4}
    row = {
        "settings": own | {"devices": 2, "methods": ["full", "full-once"], "alone": ["full"]},
        "programs": {"full ×2": {"sent_bytes": 7e9}, "full-once ×2": {"sent_bytes": None}},
        "milliseconds": {"full ×2": 25.0, "full-once ×2": 20.0, "full ×1": 15.0},
        "rounds": [{"full ×2": 25.0, "full-once ×2": 20.0, "full ×1": 15.0}],
    }
    sent = Traffic("all-reduce", "all", "micro-batch", 1.6e9, 0, 0)._asdict()
    once = sent | {"each": "update"}
    rows = [
        {"settings": case | {"division": "data", "method": name, "on_paper": False}, "traffic": [x]}
        for name, x in (("full", sent), ("full-once", once))
    ]
    assert predicted.beside(tmp_path) == "Not yet run."
    (tmp_path / "scaling.jsonl").write_text(json.dumps(row))
    (tmp_path / "wire.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = Links(within=200e9, reached=0.8, hop_within=0)  # 1.6e9 bytes take 10 ms
    *_, full, full_once = predicted.beside(tmp_path, given).splitlines()
    # Four micro-batches send 1.6e9 bytes each: 15 + 10 ms, or the larger.
    assert [cell.strip() for cell in full.split("|")[2:-1]] == [
        *("full", "7.0", "6.4", "25.0", "15.0", "25.0", "1.000", "0.600")
    ]
    # Once an update 10 ms, a quarter of them each micro-step's, which nothing overlaps.
    assert [cell.strip() for cell in full_once.split("|")[2:-1]] == [
        *("full-once", "-", "1.6", "20.0", "17.5", "17.5", "0.800", "0.750")
    ]


@pytest.mark.slow
def test_what_does_not_fit_is_a_row_and_no_abort(monkeypatch):
    case = scaling.CASES["tiny"][2]
    monkeypatch.setattr(scaling, "memory_limit", lambda: 1)
    row = scaling.measure(case, 1, None)
    assert row["error"] == row["errors"]["full ×8"]
    assert "needs 0.0 GiB" in row["error"] and row["error"].startswith("MemoryError")
    monkeypatch.setattr(scaling, "memory_limit", lambda: 2**40)
    row = scaling.measure(case, 1, None)
    peaks = {name: own["peak_bytes"] for name, own in row["programs"].items()}
    assert peaks["both-int8 ×8"] < peaks["full ×8"]
    monkeypatch.setattr(scaling, "memory_limit", lambda: peaks["full ×8"] - 1)
    row = scaling.measure(case, 1, None)
    assert [*row["errors"]] == ["full ×8"]
    assert [*row["milliseconds"]] == ["both-int8 ×8"]
    compiled = scaling.measure(case, None, None)
    assert "milliseconds" not in compiled
    assert {name: own["peak_bytes"] for name, own in compiled["programs"].items()} == peaks


def test_operations_are_eight_for_each_weight_and_token():
    """Two forward, two recomputed, four backward; and those of attention."""
    shape = models.SHAPES["llama-7b"]
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(_sizes(shape)) if len(x.shape) > 1)
    weights -= shape.vocabulary * shape.width  # the embedding multiplies nothing
    attention = shape.layers * 4 * 2 * 2 * 512 * shape.width
    expected = 1000 * (8 * weights + attention)
    assert links.operations(shape, 1000, 512) == pytest.approx(expected, rel=1e-3)


def _sizes(shape):
    return models.parameter_shapes(shape, jnp.bfloat16)

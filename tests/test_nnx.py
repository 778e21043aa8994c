"""`flax.nnx.Optimizer` shows `init` its Variables and `update` their values: both are one leaf."""

import draws
import jax.numpy as jnp
import optax
import pytest

import florax

nnx = pytest.importorskip("flax.nnx", reason="flax comes with the extra `examples`")


class Network(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.Linear(16, 16, rngs=rngs)
        self.mlp = nnx.Linear(16, 32, rngs=rngs)
        self.head = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.mlp(self.attn(x))))


def rank(path, leaf):
    return 4 if florax.attention_and_feed_forward(path, leaf) else None


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(
            optax.chain(optax.adafactor(0.1), florax.flora_momentum(rank)),
            id="momentum",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            florax.flora_accumulate(optax.sgd(0.5), every_k_schedule=2, rank=rank), id="accumulate"
        ),
    ],
)
def test_an_nnx_optimizer_trains_with_florax(tx):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = draws.normal(0, 64, 16)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    report = florax.state_report(tx, nnx.state(model, nnx.Param))
    compressed = {row.path.partition("]")[0] for row in report.rows if row.rank is not None}
    assert compressed == {"['attn'", "['mlp'"}

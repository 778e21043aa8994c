"""How many bytes of gradients do eight data-parallel devices all-reduce in a micro-step?

    python benchmarks/allreduce.py --model gpt2

Counted in the program that XLA compiles for eight host devices, all-reduces inside of loops as
often as the loop runs. Only the compressed leaves, attention and feed-forward, are differentiated:
the others have the same gradients with and without florax.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import florax
from florax_benchmarks import collectives, models, results, tables

DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    model: models.ModelName = "gpt2"  # whose gradients
    rank: int = 256  # of the sketches
    results: Path = results.FOLDER  # folder for the JSON


def measure(s: Settings) -> dict[str, Any]:
    shape = models.SHAPES[s.model]
    params = models.parameter_shapes(shape, jnp.float32)

    def take(compressed: bool) -> Any:
        def leaf_or_none(path: tuple, leaf: Any) -> Any:
            return leaf if florax.attention_and_feed_forward(path, leaf) == compressed else None

        return jax.tree_util.tree_map_with_path(leaf_or_none, params)

    matrices, others = take(True), take(False)
    tx = florax.flora_accumulate(florax.per_layer(optax.sgd(1.0), models.is_stacked), 1, s.rank)
    state = jax.eval_shape(tx.init, matrices)

    def loss_fn(matrices: Any, others: Any, batch: Any) -> jax.Array:
        params = jax.tree.map(
            lambda a, b: b if a is None else a, matrices, others, is_leaf=lambda x: x is None
        )
        return models.loss(shape, params, batch)

    def dense(matrices: Any, state: Any, others: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss_fn)(matrices, others, batch)

    def sketched(matrices: Any, state: Any, others: Any, batch: Any) -> Any:
        return florax.value_and_grad(loss_fn, tx)(matrices, others, batch, opt_state=state)

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), "data")
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    batch = models.batch_shapes(shape, DEVICES, 128, 128)

    def reduced(step: Any) -> int:
        jitted = jax.jit(step, in_shardings=(replicated, replicated, replicated, split))
        text = jitted.lower(matrices, state, others, batch).compile().as_text()
        return collectives.payload(collectives.read(text, DEVICES))

    leaves = [leaf.shape for leaf in jax.tree.leaves(matrices)]
    kept = sum(math.prod(shape) * s.rank / min(shape[1:]) for shape in leaves)
    return {
        "dense_bytes": reduced(dense),
        "sketched_bytes": reduced(sketched),
        "rank_over_side": kept / sum(map(math.prod, leaves)),
    }


def main(s: Settings) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    os.environ["FLORAX_DEVICE"] = f"{DEVICES} × cpu"
    settings = {"model": s.model, "rank": s.rank}
    print(tables.allreduce([results.get(s.results, "allreduce", settings, lambda: measure(s))]))


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))

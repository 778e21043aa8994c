"""What users say of leaves: axes, one value per leaf, and which leaves are layers' weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import florax
from florax import FloraDimensionNumbers as Axes
from florax import _dimensions


def test_axes_may_be_ints_lists_and_numpy_integers():
    assert Axes(0, [1, 2], np.int64(3)) == Axes((0,), (1, 2), (3,))


TREE = {"a": jnp.zeros(1), "b": [jnp.zeros(2), jnp.zeros(3)], "none": None}
SPECIFICATIONS = {
    "one value": (7, [7, 7, 7]),
    "prefix": ({"a": 1, "b": 2, "none": None}, [1, 2, 2]),
    "tree": ({"a": 1, "b": [None, 3], "none": None}, [1, None, 3]),
    "function": (lambda path, leaf: leaf.size, [1, 2, 3]),
    "function of the path": (lambda path, leaf: len(path), [1, 2, 2]),
}


@pytest.mark.parametrize("spec, values", SPECIFICATIONS.values(), ids=SPECIFICATIONS.keys())
def test_a_specification_gives_one_value_for_every_leaf(spec, values):
    assert _dimensions.resolve("spec", spec, TREE) == values


def test_a_leaf_is_called_by_its_path_as_users_write_it():
    assert _dimensions.names(TREE) == ["['a']", "['b'][0]", "['b'][1]"]
    assert _dimensions.names(jnp.zeros(1)) == ["<root>"]


def test_a_box_around_a_leaf_is_no_part_of_its_name():
    """As around parameters of `flax.nnx` and of `flax.linen`."""
    assert _dimensions.name((DictKey("a"), GetAttrKey("value"))) == "['a']"
    assert _dimensions.name((GetAttrKey("layers"), SequenceKey(0))) == ".layers[0]"


# --- attention_and_feed_forward

LAYERS = """
transformer/h/0/attn/c_attn/kernel
transformer/h/0/attn/c_proj/kernel
transformer/h/11/mlp/c_fc/kernel
transformer/h/11/mlp/c_proj/kernel
h.0.attn.c_attn.weight
h.0.mlp.c_proj.weight

encoder/block/0/layer/0/SelfAttention/q/kernel
encoder/block/0/layer/0/SelfAttention/o/kernel
encoder/block/0/layer/1/DenseReluDense/wi/kernel
encoder/block/0/layer/1/DenseReluDense/wi_0/kernel
decoder/block/5/layer/1/EncDecAttention/k/kernel
decoder/block/5/layer/2/DenseReluDense/wo/kernel
decoder.block.5.layer.2.DenseReluDense.wo.weight
params/decoder/layers_0/encoder_decoder_attention/query/kernel
params/decoder/layers_0/mlp/wi_0/kernel

model/layers/0/self_attn/q_proj/kernel
model/layers/31/self_attn/o_proj/kernel
model/layers/31/mlp/gate_proj/kernel
model/layers/31/mlp/down_proj/kernel
model.layers.31.mlp.down_proj.weight
model/layers/0/block_sparse_moe/experts/3/w1/kernel
layers/attention/wq/kernel
layers/feed_forward/w2/kernel

vit/encoder/layer/0/attention/attention/query/kernel
vit/encoder/layer/0/attention/output/dense/kernel
vit/encoder/layer/0/intermediate/dense/kernel
vit/encoder/layer/11/output/dense/kernel
vit.encoder.layer.11.output.dense.weight
bert/encoder/layer/0/output/dense/kernel
params/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel
params/Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel
params/encoder/ffn/linear/w
"""

OTHERS = """
transformer/wte/embedding
transformer/wpe/embedding
transformer/h/0/ln_1/scale
transformer/h/0/attn/c_attn/bias
transformer/ln_f/scale
lm_head/kernel
h.0.attn.c_attn.bias

shared/embedding
encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding
encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder/block/0/layer/0/layer_norm/weight
encoder/final_layer_norm/weight
params/token_embedder/embedding
params/decoder/layers_0/pre_attention_layer_norm/scale
params/decoder/logits_dense/kernel

model/embed_tokens/embedding
model/layers/0/input_layernorm/weight
model/layers/0/post_attention_layernorm/weight
model/norm/weight

vit/embeddings/cls_token
vit/embeddings/patch_embeddings/projection/kernel
vit/embeddings/position_embeddings
vit/encoder/layer/0/layernorm_before/scale
vit/encoder/layer/0/attention/attention/query/bias
vit/layernorm/scale
bert/encoder/layer/0/attention/output/LayerNorm/scale
bert/encoder/layer/0/output/LayerNorm/scale
params/Transformer/posembed_input/pos_embedding
classifier/kernel
head/kernel
"""


def key_path(text):
    return tuple(
        SequenceKey(int(part)) if part.isdigit() else DictKey(part) for part in text.split("/")
    )


@pytest.mark.parametrize("text", LAYERS.split())
def test_weights_of_attention_and_feed_forward_layers_are_recognised(text):
    assert florax.attention_and_feed_forward(key_path(text), None)


@pytest.mark.parametrize("text", OTHERS.split())
def test_embeddings_norms_biases_and_heads_are_not_of_these_layers(text):
    assert not florax.attention_and_feed_forward(key_path(text), None)


def test_attributes_are_names_like_keys():
    """As in Equinox modules, and in `flax.nnx` states, whose leaves are `.value`."""
    path = (GetAttrKey("layers"), SequenceKey(0), GetAttrKey("attention"), GetAttrKey("weight"))
    assert florax.attention_and_feed_forward(path, None)
    assert florax.attention_and_feed_forward((DictKey("mlp"), GetAttrKey("value")), None)
    assert not florax.attention_and_feed_forward((DictKey("wte"), GetAttrKey("value")), None)


def recognised(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if florax.attention_and_feed_forward(path, leaf)
    }


def test_it_reads_the_paths_of_a_linen_model():
    linen = pytest.importorskip("flax.linen", reason="flax comes with the extra `examples`")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(32, 16)(tokens)
            x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
            x = linen.LayerNorm()(x)
            return linen.Dense(32, name="head")(linen.Dense(16, name="mlp_in")(x))

    params = jax.eval_shape(Block().init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    attention = {f"params/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert recognised(params) == attention | {"params/mlp_in/kernel"}


def test_it_reads_the_paths_of_an_nnx_model():
    nnx = pytest.importorskip("flax.nnx", reason="flax comes with the extra `examples`")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 16, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.mlp = nnx.List([nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)])
            self.head = nnx.Linear(16, 32, rngs=rngs)

    params = nnx.state(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param)
    names = {name.removesuffix("/value") for name in recognised(params)}
    attention = {f"attn/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert names == attention | {"mlp/0/kernel", "mlp/1/kernel"}

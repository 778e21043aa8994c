"""`models.checkpoints`: what is saved is loaded again; what is wrong is said in a sentence."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from random import Random

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest

extras.need("examples")

import safetensors
import safetensors.numpy
from flax import nnx

from florax_examples.models import checkpoints, lora
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.models.gpt2 import GPT2, GPT2Config

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs {REFERENCE}")

TINY = GPT2Config(vocab_size=20, n_positions=6, n_embd=8, n_layer=3, n_head=2)
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)


def build(config):
    return draws.normal_module(lambda: GPT2(config, rngs=nnx.Rngs(0)), scale=1.0)


def stacked(model):
    model = nnx.clone(model)
    model.stack()
    return model


def assert_same(first, second):
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


@pytest.fixture(scope="module")
def tied():
    return build(TINY)


@pytest.fixture(scope="module")
def untied():
    return build(UNTIED)


@pytest.fixture(scope="module")
def pristine(untied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "untied"
    checkpoints.save(untied, folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def rewrite(folder, change):
    """Apply `change` to the tensors of a folder."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


# What is saved is loaded.


@pytest.mark.parametrize("most", [10**9, 2000])
@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_a_saved_model_is_loaded_bit_by_bit_in_either_form(config, most, tmp_path):
    model = build(config)
    checkpoints.save(model, tmp_path / "list", max_shard_size=most)
    checkpoints.save(stack := stacked(model), tmp_path / "stack", max_shard_size=most)
    assert_same(stack, stacked(model))  # saving has not changed it
    for file in (tmp_path / "list").iterdir():
        assert file.read_bytes() == (tmp_path / "stack" / file.name).read_bytes()
    assert_same(checkpoints.load(tmp_path / "list", GPT2), model)
    assert_same(checkpoints.load(tmp_path / "list", GPT2, stacked=True), stack)


def test_a_file_holds_the_tensors_as_torch_has_them(untied, pristine):
    with safetensors.safe_open(pristine / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, untied.lm_head.kernel[...])
    own = untied.h[1].attn.c_proj.kernel[...]
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_proj.weight"], own)
    config = json.loads((pristine / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert not config["tie_word_embeddings"]


def test_a_large_model_is_split_into_files_with_an_index(untied, pristine, tmp_path):
    checkpoints.save(untied, tmp_path / "split", max_shard_size=2000)
    whole = safetensors.numpy.load_file(pristine / "model.safetensors")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_size": sum(array.nbytes for array in whole.values()),
        "total_parameters": sum(array.size for array in whole.values()),
    }
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert {file.name for file in (tmp_path / "split").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *files,
    }
    found = {}
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / "split" / file)
        assert sum(array.nbytes for array in tensors.values()) <= 2000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.slow
def test_parameters_get_the_dtype_asked_for_and_files_that_of_the_parameters(tied, tmp_path):
    checkpoints.save(tied, tmp_path / "float32")
    low = checkpoints.load(tmp_path / "float32", GPT2, param_dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(tied))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(low), rounded)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.bfloat16)}

    checkpoints.save(low, tmp_path / "bfloat16")
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    kept = safetensors.numpy.load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert {array.dtype for array in kept.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_same(checkpoints.load(tmp_path / "bfloat16", GPT2, param_dtype=jnp.bfloat16), low)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    for stack in (False, True):
        high = checkpoints.load(tmp_path / "bfloat16", GPT2, stacked=stack, dtype=jnp.bfloat16)
        if stack:
            high.unstack()
        jax.tree.map(np.testing.assert_array_equal, nnx.state(high), exact)
        assert {x.dtype for x in jax.tree.leaves(nnx.state(high))} == {jnp.dtype(jnp.float32)}


@needs_reference
@pytest.mark.parametrize("name", ["gpt2_sharded", "gpt2_hub_names"])
def test_shards_and_names_without_prefix_make_the_same_model(name):
    assert_same(
        checkpoints.load(REFERENCE / name, GPT2), checkpoints.load(REFERENCE / "gpt2", GPT2)
    )


@needs_reference
def test_a_file_of_transformers_is_saved_as_it_was(tmp_path):
    checkpoints.save(checkpoints.load(REFERENCE / "gpt2", GPT2), tmp_path / "gpt2")
    ours, theirs = (
        safetensors.numpy.load_file(path / "model.safetensors")
        for path in (tmp_path / "gpt2", REFERENCE / "gpt2")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, theirs = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "gpt2", REFERENCE / "gpt2")
    )
    assert {name: theirs[name] for name in ours if name != "torch_dtype"}.items() <= ours.items()


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_transformers_computes_the_same(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = build(config)
    checkpoints.save(model, tmp_path / "model", max_shard_size=2000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = np.arange(6)[None]
    expected = theirs(torch.from_numpy(ids)).logits.detach().numpy()
    np.testing.assert_allclose(model(ids)[0], expected, atol=1e-4)


# What files of several kinds mean.


def test_a_head_that_equals_the_embedding_is_tied_to_it_whatever_the_config_says(tied, folder):
    def duplicate(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]

    rewrite(folder, duplicate)
    model = checkpoints.load(folder, GPT2)
    assert model.config == TINY
    assert not hasattr(model, "lm_head")


def test_a_head_of_its_own_is_kept_whatever_the_config_says(untied, folder):
    reconfigure(folder, tie_word_embeddings=True)
    assert_same(checkpoints.load(folder, GPT2), untied)


def test_without_a_head_the_config_decides(tied, folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"model lacks lm_head\.weight$"):
        checkpoints.load(folder, GPT2)
    reconfigure(folder, tie_word_embeddings=...)  # absent in old files, and true by default
    assert checkpoints.load(folder, GPT2).config == TINY


def test_buffers_are_ignored(untied, folder):
    def add_buffers(tensors):
        for i in range(TINY.n_layer):
            tensors[f"transformer.h.{i}.attn.bias"] = np.ones((1, 1, 6, 6), np.uint8)
            tensors[f"transformer.h.{i}.attn.masked_bias"] = np.full((1,), -1e4, np.float32)

    rewrite(folder, add_buffers)
    assert_same(checkpoints.load(folder, GPT2), untied)


def test_a_tensor_may_have_another_name(untied, folder, monkeypatch):
    def rename(tensors):
        tensors["old"] = tensors.pop("transformer.ln_f.bias")

    rewrite(folder, rename)
    monkeypatch.setattr(GPT2, "other_names", {"old": "transformer.ln_f.bias"}, raising=False)
    assert_same(checkpoints.load(folder, GPT2), untied)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
def test_fresh_tensors_are_drawn_and_the_others_are_loaded(untied, folder, stack):
    def load(seed):
        config = dataclasses.replace(UNTIED, n_positions=9)
        fresh = (r"transformer\.wpe\.weight", r"transformer\.h\.1\.mlp\.c_fc\.weight")
        options = {"stacked": stack, "rngs": nnx.Rngs(seed)}
        model = checkpoints.load(folder, GPT2, config=config, fresh=fresh, **options)
        if stack:
            model.unstack()
        return dict(nnx.to_flat_state(nnx.state(model)))

    first, again, other = load(0), load(0), load(1)
    drawn = {("wpe", "embedding"), ("h", 1, "mlp", "c_fc", "kernel")}
    for path, kept in nnx.to_flat_state(nnx.state(untied)):
        np.testing.assert_array_equal(first[path][...], again[path][...])
        if path in drawn:
            assert 0.01 < jnp.std(first[path][...]) < 0.04  # GPT-2 starts at 0.02
            assert (first[path][...] != other[path][...]).all()
        else:
            np.testing.assert_array_equal(first[path][...], kept[...])
    assert first["wpe", "embedding"].shape == (9, 8)


# What is wrong with a folder.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def index(**files):
    return json.dumps({"weight_map": files})


PROBLEMS = {
    "no config": (lambda f: (f / "config.json").unlink(), "model has no config.json"),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json cannot be read as JSON",
    ),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json holds no JSON object",
    ),
    "another type": (lambda f: reconfigure(f, model_type="bert"), "of type 'bert', not 'gpt2'"),
    "no type": (lambda f: reconfigure(f, model_type=..., architectures=...), "of type None, not"),
    "not implemented": (
        lambda f: reconfigure(f, activation_function="relu"),
        "cannot be built: activation_function must be .* got 'relu'",
    ),
    "no number": (
        lambda f: reconfigure(f, n_embd="wide"),
        "describes a model that cannot be built",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model has no model.safetensors$",
    ),
    "weights of torch": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no model.safetensors; pytorch_model.bin cannot be read, only safetensors can",
    ),
    "truncated": (
        lambda f: truncate(f / "model.safetensors"),
        "model.safetensors is no complete safetensors file",
    ),
    "missing": (
        lambda f: rewrite(f, lambda t: [t.pop(f"transformer.h.{i}.ln_1.bias") for i in range(3)]),
        r"lacks transformer.h.0.ln_1.bias, transformer.h.1.ln_1.bias, transformer.h.2.ln_1.bias$",
    ),
    "more layers": (
        lambda f: reconfigure(f, n_layer=1),
        r"has, of which the model knows nothing, transformer.h.1.* and 21 more$",
    ),
    "renamed": (
        lambda f: rewrite(f, lambda t: t.update(x=t.pop("transformer.wpe.weight"))),
        r"lacks transformer.wpe.weight; it has, of which the model knows nothing, x$",
    ),
    "another shape": (
        lambda f: reconfigure(f, n_positions=7),
        r"has transformer.wpe.weight of shape \(6, 8\) instead of \(7, 8\)$",
    ),
    "quantised": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": np.ones((20, 8), np.int8)})),
        "lm_head.weight in .*model.safetensors is stored as I8; only",
    ),
}


@pytest.mark.parametrize(("damage", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(damage, message, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load(folder, GPT2)
    assert "\n" not in str(error.value)


def test_a_missing_shard_and_a_bad_index_are_named(untied, tmp_path):
    checkpoints.save(untied, tmp_path / "model", max_shard_size=4000)
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.* is missing, which"):
        checkpoints.load(tmp_path / "model", GPT2)
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        checkpoints.load(tmp_path / "model", GPT2)


# What no program wrote: any damage is refused in a sentence, or does none.

STRANGE = [
    *(0, 1, -1, 2, 7, 10**6, 10**12, -(10**12), 1.5, float("nan"), 1e308, True, None),
    *("", "x", "relu", "../x", [], [1, 2], [10**12], [2**62, 4], [-1, 3], {}, {"a": 1}),
]


def strange_config(folder, random):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in random.sample(sorted(config), 2):
        config[name] = random.choice(STRANGE)
    path.write_text(json.dumps(config))


def strange_header(folder, random):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    kind = random.choice(["length", "bytes", "end", "field", "field"])
    if kind == "length":
        length = random.choice([0, 1, size - 1, size + 1, 2**40, 2**63, 2**64 - 1])
        content[:8] = length.to_bytes(8, "little")
    elif kind == "bytes":
        for _ in range(random.randint(1, 4)):
            content[8 + random.randrange(size)] = random.randrange(256)
    elif kind == "end":
        content = content[: random.randrange(len(content))]
    else:
        header = json.loads(bytes(content[8 : 8 + size]))
        name = random.choice(sorted(header.keys() - {"__metadata__"}))
        field = random.choice(["shape", "data_offsets", "dtype"])
        header[name][field] = random.choice([*STRANGE, "F64", "I8"])
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(content[8 + size :])
    path.write_bytes(bytes(content))


def strange_index(folder, random):
    path = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = list(safetensors.numpy.load_file(folder / "a.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    strange = [*STRANGE, "/etc/passwd", "../model/a.safetensors", "a/b", ".", ".."]
    kind = random.randrange(5)
    if kind == 0:
        index = random.choice(strange)
    elif kind == 1:
        index["weight_map"] = random.choice(strange)
    else:
        index["weight_map"][random.choice(names)] = random.choice(strange)
    path.write_text(json.dumps(index))


def damage_and_load(seed, pristine, parent):
    own = Random(seed)
    folder = parent / f"model {seed}"
    shutil.copytree(pristine, folder)
    own.choice([strange_config, strange_header, strange_index])(folder, own)
    try:
        checkpoints.load(folder, GPT2)
    except CheckpointError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)


def test_any_damage_to_a_folder_is_said_in_a_sentence(pristine, tmp_path):
    for seed in range(50):
        damage_and_load(seed, pristine, tmp_path)


@pytest.mark.slow
def test_much_damage_to_a_folder_is_said_in_a_sentence(pristine, tmp_path):
    for seed in range(50, 1050):
        damage_and_load(seed, pristine, tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "a/b", "..", ""])
def test_an_index_names_nothing_outside_of_its_folder(name, folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"names {name!r}, which is no file beside it"):
        checkpoints.load(folder, GPT2)


def test_no_model_is_built_of_more_layers_than_there_are_tensors(folder):
    reconfigure(folder, n_layer=10**12)
    with pytest.raises(CheckpointError, match=r"tensors, too few for n_layer=1000000000000$"):
        checkpoints.load(folder, GPT2)


def test_architecture_stands_in_for_an_absent_type(untied, folder):
    reconfigure(folder, model_type=...)
    assert_same(checkpoints.load(folder, GPT2), untied)


# Which folder.


def test_a_folder_is_its_own_name(tmp_path):
    assert checkpoints.resolve(str(tmp_path)) == tmp_path


def test_what_is_no_folder_and_no_hub_name_is_said_to_be_missing(tmp_path):
    for name in (tmp_path / "nowhere", "../nowhere", "two words", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"there is no folder {name}"):
            checkpoints.resolve(name)
    with pytest.raises(CheckpointError, match=f"there is no folder {tmp_path}/nowhere"):
        checkpoints.load(tmp_path / "nowhere", GPT2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file, not a folder"):
        checkpoints.resolve(tmp_path / "file")


def test_other_names_are_looked_up_on_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    def download(name, allow_patterns):
        assert name == "openai-community/gpt2"
        repository = [
            "model.safetensors",
            "tokenizer.json",
            "merges.txt",
            "tf_model.h5",
            "model.onnx",
        ]
        kept = list(hub.utils.filter_repo_objects(repository, allow_patterns=allow_patterns))
        assert kept == repository[:3]
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert checkpoints.resolve("openai-community/gpt2") == tmp_path


def test_a_hub_that_does_not_answer_or_does_not_know_is_said_to(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no folder florax/none, and .* hub does not give it"
    ):
        checkpoints.resolve("florax/none")


def test_what_looking_on_the_hub_takes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no folder gpt2, .* pip install huggingface_hub"):
        checkpoints.resolve("gpt2")


# Where to save.


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_an_older_save_is_replaced_as_a_whole(tied, untied, tmp_path):
    folder = tmp_path / "new" / "model"
    checkpoints.save(untied, folder, {"tokenizer.json": b"{}"}, max_shard_size=2000)
    checkpoints.save(tied, folder, {"tokenizer.json": b"[]"})
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "tokenizer.json").read_bytes() == b"[]"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # who may read the settings may read the weights
    assert_same(checkpoints.load(folder, GPT2), tied)


@pytest.mark.parametrize(
    ("problem", "raised", "message"),
    [
        (OSError("disk full"), CheckpointError, "model cannot be written: disk full"),
        (KeyboardInterrupt("^C"), KeyboardInterrupt, "C"),
    ],
)
def test_a_save_that_fails_leaves_the_older_one(tied, folder, problem, raised, message):
    before = contents(folder.parent)
    rename = Path.rename

    def fail(*_, **__):
        raise problem

    def fail_once(path, target):
        return fail() if path.name.endswith("new") else rename(path, target)

    for owner, name, broken in (
        (safetensors.numpy, "save_file", fail),
        (Path, "rename", fail_once),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(raised, match=message):
                checkpoints.save(tied, folder)
        assert contents(folder.parent) == before


def test_nothing_but_a_checkpoint_is_replaced(tied, folder, tmp_path):
    (folder / "notes.txt").touch()
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"model holds notes.txt, which .* would delete"):
        checkpoints.save(tied, folder)
    assert contents(folder) == before
    checkpoints.check_replaceable(folder, files=["notes.txt"])
    checkpoints.check_replaceable(tmp_path / "nothing")

    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        checkpoints.save(tied, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.save(tied, tmp_path / "file" / "model")


def test_adapters_have_to_be_merged_first(tied, tmp_path):
    model = nnx.clone(tied)
    lora.add(model, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"models\.lora\.merge"):
        checkpoints.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()

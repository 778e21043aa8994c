"""What is learned where quality is measured: models of the examples on real data, and a byte GPT.

    bytes           a small GPT over bytes of texts
    pretraining     a small LLaMA on texts
    translation     a small GPT-2 on sentence pairs: BLEU
    summarization   a published LLaMA-like model, fine-tuned on pairs: ROUGE
    denoising       a small T5 that fills gaps of texts: what `t5` goes on from
    t5              a T5, fine-tuned on pairs: ROUGE
    vision          a small ViT on images: accuracy

A task is pure functions of trees of arrays, so that many runs of it train at once, under `vmap`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import florax
from florax_benchmarks import byte_gpt, results

sys.path.append(str(results.REPOSITORY / "examples"))
import gpt2
import llama
import t5
import vit
from florax_examples import datasets, losses, metrics, text, tokenization
from florax_examples.datasets import Pair
from florax_examples.models import checkpoints, layers
from florax_examples.models.gpt2 import GPT2, GPT2Config
from florax_examples.models.llama import Llama, LlamaConfig
from florax_examples.models.t5 import T5, T5Config
from florax_examples.models.vit import ViT, ViTConfig
from florax_examples.tokenization import Tokenizer

TaskName: TypeAlias = Literal[
    "bytes", "pretraining", "translation", "summarization", "denoising", "t5", "vision"
]
VOCABULARY = 4096  # of tokenizers that are trained here
LENGTH = 128  # tokens of a row of running text
SCORED = 500  # texts or images at a time: the models are small


class Task(NamedTuple):
    """What to learn, and how one usually would."""

    # Of a key and of `saved` the parameters; `saved` has those that are not drawn.
    init: Callable[[Array, Any], Any]
    # Of parameters and a batch: the losses of its tokens or images, and which of them count.
    losses: Callable[[Any, Any], tuple[Array, Array]]
    train: Any  # a tree of arrays, along their first axis the examples
    validation: Any
    test: Any
    matrices: Callable[[Any, Any], bool]  # which parameters are compressed, by path and leaf
    is_stacked: Callable[[Any, Any], bool]  # which are stacks of layers
    unit: str  # what a loss is of
    micro_batch: int  # examples
    accumulate: int  # micro-batches an update
    updates: int
    learning_rates: tuple[float, ...]  # to choose from
    resample_every: int  # updates that share a projection of the momentum
    at_once: int  # runs that fill a GPU: fewer than learning rates and seeds where they are large
    saved: Any = ()
    is_scheduled: bool = True  # whether the learning rate rises, and falls along a cosine
    # Of parameters, on the host: scores of the test data.
    score: Callable[[Any], dict[str, float]] = lambda params: {}
    save: Callable[[Any, Path], None] | None = None  # parameters, for another task to go on from
    # Of a seed, updates, and examples of each: which ones these are, (updates, examples) numbers
    # for `take`. None: epochs, each shuffled.
    order: Callable[[int, int, int], np.ndarray] | None = None
    take: Callable[[Any, Array], Any] = lambda data, rows: jax.tree.map(lambda x: x[rows], data)


def make(name: TaskName, data: Sequence[str], model: str | None, test: Sequence[str]) -> Task:
    """The task of this name.

    Args:
      name: of the task.
      data: folders as the examples read them, the splits of which are put together; none: what
        comes with the repository.
      model: the folder of a published or saved model, for the tasks that fine-tune.
      test: more folders, whose test split is scored by itself.
    """
    if (model is not None) != (name in ("summarization", "t5")):
        raise ValueError(f"model must be given for summarization and t5 only, got model={model}")
    if test and name != "translation":
        raise ValueError(f"test is for translation only, got {name}")
    task = {
        "bytes": _bytes,
        "pretraining": _pretraining,
        "translation": functools.partial(_translation, test=test),
        "summarization": functools.partial(_summarization, model=model),
        "denoising": _denoising,
        "t5": functools.partial(_t5, model=model),
        "vision": _vision,
    }[name]
    return task([*data] or [str(datasets.FOLDER / SHIPPED[name])])


SHIPPED: dict[TaskName, str] = {
    "bytes": "tinystories",
    "pretraining": "tinystories",
    "translation": "tatoeba_deen",
    "summarization": "scitldr",
    "denoising": "tinystories",
    "t5": "scitldr",
    "vision": "fashion_mnist",
}
assert SHIPPED.keys() == {*get_args(TaskName)}


# Texts.


def _bytes(data: Sequence[str]) -> Task:
    shape = SimpleNamespace(width=256, layers=4, length=LENGTH)
    row = shape.length + 1
    stream = np.frombuffer("\n".join(_texts(data, "train")).encode()[:12_000_000], np.uint8)
    rows = min(1024, len(stream) // 10 // row)
    split = len(stream) - rows * row
    heldout = stream[split:].reshape(rows, row)

    def order(seed: int, updates: int, examples: int) -> np.ndarray:
        def starts(number: Array) -> Array:
            own = jax.random.fold_in(jax.random.key(seed), number)
            return jax.random.randint(own, (examples,), 0, split - row)

        return np.asarray(jax.vmap(starts)(jnp.arange(updates)))

    def take(stream: Array, starts: Array) -> Array:
        return stream[starts[..., None] + jnp.arange(row)]

    def own_losses(params: Any, rows: Array) -> tuple[Array, Array]:
        losses = byte_gpt.losses(shape, params, rows.astype(jnp.int32))
        return losses, jnp.ones(losses.shape, bool)

    return Task(
        init=lambda key, saved: byte_gpt.init(shape, key),
        losses=own_losses,
        train=stream[:split],
        validation=heldout,
        test=heldout,
        matrices=lambda path, leaf: path[0].key == "layers" and "norm" not in path[1].key,
        is_stacked=byte_gpt.is_stacked,
        unit="byte",
        micro_batch=1,
        accumulate=16,
        updates=800,
        learning_rates=(5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
        resample_every=50,
        at_once=15,
        is_scheduled=False,
        order=order,
        take=take,
    )


def _pretraining(data: Sequence[str]) -> Task:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    texts = {split: _texts(data, split) for split in datasets.SPLITS}
    tokenizer = tokenization.train(texts["train"], VOCABULARY)
    rows = {split: llama.pack(own, tokenizer, LENGTH) for split, own in texts.items()}
    rows |= {split: _first(rows[split], 1000) for split in ("validation", "test")}
    return Task(
        **_drawn(Llama, config),
        **rows,
        losses=_losses(Llama, config, losses.target_losses),
        unit="token",
        micro_batch=16,
        accumulate=1,
        updates=2000,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        resample_every=100,
        at_once=5,
    )


def _denoising(data: Sequence[str]) -> Task:
    texts = {split: _texts(data, split) for split in datasets.SPLITS}
    tokenizer = tokenization.train(texts["train"], VOCABULARY - SENTINELS)
    config = _t5_config()

    def rows(split: str, most: int | None, times: int = 1) -> Any:
        ids = _first(llama.pack(texts[split], tokenizer, LENGTH)["ids"], most)
        again = np.tile(ids[:, :LENGTH], (times, 1))
        return corrupt(again, tokenizer, np.random.default_rng(0))

    def save(params: Any, folder: Path) -> None:
        model = nnx.merge(_graphdef(T5, config), params)
        model.unstack()
        checkpoints.save(model, folder, tokenizer.files)

    return Task(
        **_drawn(T5, config),
        train=rows("train", None, CORRUPTIONS),
        validation=rows("validation", 500),
        test=rows("test", 500),
        losses=_losses(T5, config, t5.losses),
        unit="token",
        micro_batch=64,
        accumulate=1,
        updates=15_000,
        learning_rates=(1e-3,),
        resample_every=100,
        at_once=1,
        save=save,
    )


SENTINELS = 32  # the last ids: gaps of a row
GAP = 3  # tokens, on average
CORRUPTED = 0.15  # of the tokens
CORRUPTIONS = 2  # of every row to train on, which is seen several times


def corrupt(ids: np.ndarray, tokenizer: Tokenizer, draw: np.random.Generator) -> Any:
    """Rows of T5's span corruption: gaps to fill, marked by the last ids of the vocabulary."""
    count, length = ids.shape
    gaps = round(length * CORRUPTED / GAP)
    hidden = gaps * GAP
    sources = np.full((count, length - hidden + gaps + 1), tokenizer.pad, np.int32)
    targets = np.full((count, hidden + gaps + 1), tokenizer.pad, np.int32)
    for row, source, target in zip(ids, sources, targets, strict=True):
        # Gaps of at least one token, at least one token apart.
        cuts = np.sort(draw.choice(np.arange(1, hidden), gaps - 1, replace=False))
        sizes = np.diff([0, *cuts, hidden])
        spaces = np.sort(draw.choice(np.arange(1, length - hidden), gaps - 1, replace=False))
        between = np.diff([0, *spaces, length - hidden])
        kept, filled, place = [], [], 0
        for i, (space, size) in enumerate(zip(between, sizes, strict=True)):
            sentinel = VOCABULARY - 1 - i
            kept += [*row[place : place + space], sentinel]
            filled += [sentinel, *row[place + space : place + space + size]]
            place += space + size
        source[:] = [*kept, tokenizer.eos]
        target[:] = [*filled, tokenizer.eos]
    lengths = {"source_length": sources.shape[1], "target_length": targets.shape[1]}
    return {"source": sources, "target": targets} | {
        name: np.full(count, size, np.int32) for name, size in lengths.items()
    }


# Pairs.


def _translation(data: Sequence[str], test: Sequence[str]) -> Task:
    length, new_tokens, scored = 64, 40, 1000
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=256, n_layer=4, n_head=4)
    pairs = {split: _pairs(data, split) for split in datasets.SPLITS}
    tests = {"BLEU": pairs["test"][:scored]}
    tests |= {f"BLEU {Path(f).name}": datasets.load_pairs(f, "test")[:scored] for f in test}
    texts = [f"{gpt2.PROMPT.format(source=p.source)} {p.target}" for p in pairs["train"]]
    tokenizer = tokenization.train(texts, VOCABULARY)
    rows = {split: gpt2.encode(own, tokenizer, length) for split, own in pairs.items()}
    rows |= {split: _first(rows[split], 1000) for split in ("validation", "test")}

    def score(params: Any) -> dict[str, float]:
        model = nnx.merge(_graphdef(GPT2, config), params)
        found = {}
        for name, own in tests.items():
            prompts = [gpt2.encode_prompt(pair, tokenizer) for pair in own]
            keep = [i for i, ids in enumerate(prompts) if len(ids) <= length]
            asked = [prompts[i] for i in keep]
            written = text.generate(model, tokenizer, asked, new_tokens, batch=SCORED)
            found[name] = metrics.bleu(written, [own[i].references for i in keep])
        return found

    return Task(
        **_drawn(GPT2, config),
        **rows,
        losses=_losses(GPT2, config, losses.target_losses),
        unit="token",
        micro_batch=4,
        accumulate=16,
        updates=1000,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        resample_every=100,
        at_once=15,
        score=score,
    )


def _summarization(data: Sequence[str], model: str) -> Task:
    template = (
        "<|im_start|>user\nSummarize this abstract in one sentence.\n\n{source}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = llama.Settings(
        model=model, data=data[0], length=384, new_tokens=56, heldout_texts=300, template=template
    )
    config = checkpoints.read_config(Path(model), Llama)
    tokenizer, rows, prompts = llama.read_pairs(own, config.vocab_size)
    loaded = checkpoints.load(Path(model), Llama, stacked=True, checkpoint=True)
    graphdef, saved = nnx.split(loaded)

    def score(params: Any) -> dict[str, float]:
        ids = [prompt.ids for prompt in prompts]
        written = text.generate(nnx.merge(graphdef, params), tokenizer, ids, own.new_tokens)
        return metrics.rouge(written, [prompt.expected for prompt in prompts])

    return Task(
        **_saved(graphdef, saved),
        **rows,
        losses=lambda params, batch: losses.target_losses(nnx.merge(graphdef, params), batch),
        unit="token",
        micro_batch=1,
        accumulate=16,
        updates=124,
        learning_rates=(1e-4, 2e-4, 4e-4, 8e-4),
        resample_every=50,
        at_once=4,
        score=score,
    )


def _t5(data: Sequence[str], model: str) -> Task:
    own = t5.Settings(source_length=256, target_length=48)
    tokenizer = tokenization.load(Path(model))
    loaded = checkpoints.load(Path(model), T5, stacked=True)
    graphdef, saved = nnx.split(loaded)
    pairs = {split: _pairs(data, split) for split in datasets.SPLITS}
    test = pairs["test"][:500]
    rows = {split: t5.encode(these, tokenizer, own) for split, these in pairs.items()}
    rows |= {split: _first(rows[split], 500) for split in ("validation", "test")}

    def score(params: Any) -> dict[str, float]:
        written = text.generate(
            nnx.merge(graphdef, params),
            tokenizer,
            [t5.encode_source(pair, tokenizer, own) for pair in test],
            own.target_length,
            batch=SCORED,
            write=functools.partial(t5.write, length_penalty=1.0),
        )
        return metrics.rouge(written, [pair.references for pair in test])

    return Task(
        **_saved(graphdef, saved),
        **rows,
        losses=lambda params, batch: t5.losses(nnx.merge(graphdef, params), batch),
        unit="token",
        micro_batch=1,
        accumulate=16,
        updates=400,
        learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        resample_every=100,
        at_once=15,
        score=score,
    )


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )


# Images.


def _vision(data: Sequence[str]) -> Task:
    images = {split: datasets.load_images(data[0], split) for split in datasets.SPLITS}
    names = images["train"].class_names
    config = ViTConfig(
        image_size=images["train"].images.shape[1],
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=len(names),
        id2label=names,
    )
    test = images["test"]

    def score(params: Any) -> dict[str, float]:
        predicted = vit.predict(nnx.merge(_graphdef(ViT, config), params), test.images, SCORED)
        return {"accuracy": metrics.accuracy(predicted, test.labels)}

    return Task(
        **_drawn(ViT, config),
        **{split: vit.rows(own) for split, own in images.items()},
        losses=_losses(ViT, config, vit.losses),
        unit="image",
        micro_batch=64,
        accumulate=1,
        updates=2000,
        learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        resample_every=100,
        at_once=5,
        score=score,
    )


# What these have in common.


def _texts(data: Sequence[str], split: str) -> list[str]:
    return [line for folder in data for line in datasets.load_texts(folder, split)]


def _pairs(data: Sequence[str], split: str) -> list[Pair]:
    """To train on, all; held out, those of the first folder: one kind of text."""
    folders = data if split == "train" else data[:1]
    return [pair for folder in folders for pair in datasets.load_pairs(folder, split)]


def _first(data: Any, most: int | None) -> Any:
    return jax.tree.map(lambda x: x[:most], data)


def _graphdef(model_class: Any, config: Any) -> Any:
    return nnx.split(nnx.eval_shape(lambda: _new(model_class, config, jax.random.key(0))))[0]


def _new(model_class: Any, config: Any, key: Array) -> Any:
    model = model_class(config, rngs=nnx.Rngs(key))
    if hasattr(model, "stack"):
        model.stack()
    return model


def _drawn(model_class: Any, config: Any) -> dict[str, Any]:
    return {
        "init": lambda key, saved: nnx.split(_new(model_class, config, key))[1],
        "matrices": florax.attention_and_feed_forward,
        "is_stacked": lambda path, leaf: layers.is_in_stack(path),
    }


def _saved(graphdef: Any, saved: Any) -> dict[str, Any]:
    return {
        "init": lambda key, saved: saved,
        "saved": saved,
        "matrices": florax.attention_and_feed_forward,
        "is_stacked": lambda path, leaf: layers.is_in_stack(path),
    }


def _losses(model_class: Any, config: Any, own: Any) -> Callable[[Any, Any], tuple[Array, Array]]:
    graphdef = _graphdef(model_class, config)
    return lambda params, batch: own(nnx.merge(graphdef, params), batch)

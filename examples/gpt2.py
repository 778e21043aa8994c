"""Train a small GPT-2 to translate German, with accumulation and momentum kept in three ways.

    python examples/gpt2.py                             # all three: minutes on two CPU cores
    python examples/gpt2.py --method flora --rank 20    # one of them, other settings
    python examples/gpt2.py --method flora --layerwise  # a block at a time
    python examples/gpt2.py --help

Each update learns from 64 sentence pairs, which come as 4 micro-batches of 16:

    none   Adafactor, an update for every micro-batch: no accumulator and no momentum, the floor
    full   gradients accumulated over the micro-batches, Adafactor, momentum: both at full size
    flora  the same, but accumulator and momentum of the weight matrices are random sketches,
           and so are their gradients: none of full size exists

All see the same sentences in the same order. What comes out: a few held-out translations, a table
of memory, time and quality, and in the output folder the loss curves and the figures of the table.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
import tyro
from flax import nnx
from jax import Array
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

import florax
from common.comparison import Curve, format_table, human, plot_curves, tree_bytes
from common.decoding import greedy
from common.losses import chunked_cross_entropy
from common.text import Pair, pad, read_pairs, shuffled, train_tokenizer
from models.gpt2 import GPT2, GPT2Config, init_cache

METHODS = ("none", "full", "flora")
SPLITS = ("train", "validation", "test")
SPECIAL_TOKENS = ("<pad>", "<sep>", "<eos>")
PAD, SEP, EOS = range(3)

# Each the best of 0.5, 1, 2, 4 and 8 times 1e-3, by the validation loss after 2,000 updates.
LEARNING_RATES = {"none": 1e-3, "full": 2e-3, "flora": 2e-3}
TRANSLATION_TOKENS = 16  # at most; hardly an English sentence of the data has more
LOGITS = 1024  # tokens that have them at once; with GPT-2's own vocabulary 200 MiB
LOG_EVERY = 5  # updates; to read a loss is to wait for it
EVALUATIONS = 10  # of the validation loss along a run
SHOWN = 8  # translations


@dataclasses.dataclass(frozen=True)
class Settings:
    method: Literal["none", "full", "flora", "all"] = "all"  # which rows of the table
    data: Path = Path(__file__).parent / "data/tatoeba_deen"  # {train,validation,test}.jsonl.gz
    output: Path = Path("runs/gpt2")  # gets loss.png and results.json
    seed: int = 0  # of the weights, the order of the pairs and the projections

    # The model: what two CPU cores can train in two minutes.
    vocab_size: int = 2048  # of a byte-level BPE that both languages share
    length: int = 24  # tokens of a pair; 1% of the pairs are longer and are left out
    n_layer: int = 3  # blocks of attention and feed-forward
    n_embd: int = 160  # from 128 on, Adafactor factors its second moments
    n_head: int = 5  # of 32 dimensions each

    # The training: a little more than two epochs.
    updates: int = 1500  # of `full` and `flora`; `none` makes `accumulate` times as many
    micro_batch: int = 16  # pairs whose activations exist at once
    accumulate: int = 4  # micro-batches an update
    learning_rate: float | None = None  # at its peak; None: the best of a sweep, per method
    warmup: float = 0.05  # share of the updates; Adafactor's first second moments are rough
    decay: float = 0.9  # of the momentum
    layerwise: bool = False  # a block at a time, the least memory; for `none` and `flora`

    # FLORA.
    rank: int = 40  # a quarter of the width, so that a sketch is a quarter of its matrix
    resample_every: int = 100  # updates that share a projection of the momentum
    gradients: Literal["sketched", "dense"] = "sketched"  # or compressed once they exist

    def __post_init__(self):
        sizes = "length n_layer n_embd n_head updates micro_batch accumulate rank resample_every"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.vocab_size < (least := 256 + len(SPECIAL_TOKENS)):  # a token for every byte
            raise ValueError(f"vocab_size must be at least {least}, got {self.vocab_size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        if self.rank >= self.n_embd:
            raise ValueError(f"rank={self.rank} saves nothing: lower it below n_embd={self.n_embd}")
        if self.layerwise and self.method in ("full", "all"):
            raise ValueError(
                f"layerwise never has all gradients, which method={self.method} accumulates at "
                "full size: choose --method none or --method flora"
            )
        if self.layerwise and self.method == "flora" and self.gradients == "dense":
            raise ValueError("layerwise needs gradients=sketched, got gradients=dense")
        for split in SPLITS:
            if not (file := self.data / f"{split}.jsonl.gz").is_file():
                raise ValueError(f"there is no {file}; data must name a folder of sentence pairs")

    def peak(self, method: str) -> float:
        return self.learning_rate or LEARNING_RATES[method]


# The data.


class Data(NamedTuple):
    tokenizer: ByteLevelBPETokenizer
    pairs: dict[str, list[Pair]]  # of each split
    rows: dict[str, np.ndarray]  # of each split, (pairs, length): source <sep> target <eos> <pad>*


def load_data(settings: Settings) -> Data:
    pairs = {split: read_pairs(settings.data / f"{split}.jsonl.gz") for split in SPLITS}
    texts = (text for pair in pairs["train"] for text in pair)
    tokenizer = train_tokenizer(texts, settings.vocab_size, SPECIAL_TOKENS)
    rows = {}
    for split in SPLITS:
        tokens = [
            [*prompt(tokenizer, pair), *tokenizer.encode(pair.target).ids, EOS]
            for pair in pairs[split]
        ]
        short = [i for i, row in enumerate(tokens) if len(row) <= settings.length]
        if len(short) < settings.micro_batch:
            sys.exit(
                f"length={settings.length} leaves {len(short)} pairs in {split}, "
                f"less than micro_batch={settings.micro_batch}"
            )
        print(f"{split}: {len(short):,} pairs, {len(tokens) - len(short):,} left out as too long")
        pairs[split] = [pairs[split][i] for i in short]
        rows[split] = pad([tokens[i] for i in short], settings.length, PAD)
    return Data(tokenizer, pairs, rows)


def prompt(tokenizer: ByteLevelBPETokenizer, pair: Pair) -> list[int]:
    return [*tokenizer.encode(pair.source).ids, SEP]


# The optimizer.


def make_optimizer(settings: Settings, method: str) -> optax.GradientTransformation:
    s = settings
    updates = s.updates * s.accumulate if method == "none" else s.updates
    warmup = round(s.warmup * updates)
    schedule = optax.warmup_cosine_decay_schedule(0.0, s.peak(method), warmup, updates)
    adafactor = optax.adafactor(schedule, multiply_by_parameter_scale=False)

    def rank(path, leaf):  # as in the paper; embeddings, norms and biases stay as they are
        return s.rank if florax.attention_and_feed_forward(path, leaf) else None

    if method == "none":
        return adafactor

    if method == "full":
        momentum = optax.ema(s.decay, debias=False)
        steps = optax.MultiSteps(optax.chain(adafactor, momentum), s.accumulate)
        return steps.gradient_transformation()

    # "cosine" loses the least for its rank; what the momentum's sketch misses of a gradient,
    # `residual` passes on without momentum.
    kind = {"projection": "cosine", "key": s.seed}
    momentum = florax.flora_momentum(rank, s.decay, s.resample_every, residual=True, **kind)
    return florax.flora_accumulate(optax.chain(adafactor, momentum), s.accumulate, rank, **kind)


def state_bytes(method: str, state: Any) -> tuple[int, int]:
    """Of the optimizer with its momentum, and of the accumulator around it."""
    if method == "none":
        return tree_bytes(state), 0
    accumulator = state.acc_grads if method == "full" else state.sketch
    return tree_bytes(state.inner_opt_state), tree_bytes(accumulator)


# The training.


def token_losses(model: GPT2, rows: Array) -> tuple[Array, Array]:
    """The loss of each target token, zero elsewhere, and which tokens count; (B, length - 1)."""
    inputs, labels = rows[:, :-1], rows[:, 1:]
    counts = (jnp.cumsum(inputs == SEP, axis=1) > 0) & (labels != PAD)
    features, _ = model.features(inputs)
    losses = chunked_cross_entropy(model.logits, features, labels, LOGITS)
    return jnp.where(counts, losses, 0.0), counts


@functools.partial(jax.jit, static_argnames="graphdef")
def heldout_loss(graphdef: nnx.GraphDef, params: nnx.State, rows: Array) -> Array:
    model = nnx.merge(graphdef, params)
    losses, counts = jax.lax.map(lambda row: token_losses(model, row[None]), rows, batch_size=64)
    return losses.sum() / counts.sum()


class Trained(NamedTuple):
    params: nnx.State
    optimizer_bytes: int  # state of Adafactor and of the momentum
    accumulator_bytes: int  # around it
    temporary_bytes: int  # of the compiled step, besides its arguments and results
    seconds: float  # without compilation and evaluation
    curve: Curve


def train(
    settings: Settings, method: str, graphdef: nnx.GraphDef, params: nnx.State, data: Data
) -> Trained:
    s = settings
    tx = make_optimizer(s, method)

    def loss_fn(params: nnx.State, rows: Array) -> Array:
        losses, counts = token_losses(nnx.merge(graphdef, params), rows)
        return losses.sum() / counts.sum()

    def train_step(params: nnx.State, state: Any, rows: Array) -> tuple[Array, nnx.State, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    # Gradients that are born as sketches are summed as such: then a step is a whole update.
    whole_update = method == "flora" and s.gradients == "sketched"
    init, step = lambda params, rows: tx.init(params), train_step
    if s.layerwise:
        init, step = florax.layerwise_value_and_update(loss_fn, tx)
    elif whole_update:
        step = florax.value_and_update(loss_fn, tx)

    rows = data.rows["train"]
    batches = shuffled(len(rows), s.micro_batch, s.seed)
    shape = (s.accumulate, s.micro_batch, s.length) if whole_update else (s.micro_batch, s.length)
    batch = jax.ShapeDtypeStruct(shape, rows.dtype)
    params = jax.tree.map(jnp.copy, params)  # the step reuses the memory of what it is given
    state = init(params, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()

    evaluations = {s.updates * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)}
    curve, losses, seconds, start = Curve([], []), [], 0.0, time.perf_counter()
    with tqdm(total=s.updates * s.accumulate, desc=f"{method:5}", unit=" micro-batches") as bar:
        for update in range(1, s.updates + 1):
            micro_batches = np.stack([rows[next(batches)] for _ in range(s.accumulate)])
            for batch in [micro_batches] if whole_update else micro_batches:
                loss, params, state = compiled(params, state, batch)
                losses.append(loss)
            seen = update * s.accumulate * s.micro_batch
            if update % LOG_EVERY == 0 or update in evaluations:
                mean_loss = float(np.mean(jax.device_get(losses)))
                curve.train.append((seen, mean_loss))
                bar.set_postfix(loss=f"{mean_loss:.2f}", refresh=False)
                bar.update(update * s.accumulate - bar.n)
                losses = []
            if update in evaluations:
                seconds += time.perf_counter() - start
                heldout = heldout_loss(graphdef, params, data.rows["validation"])
                curve.heldout.append((seen, float(heldout)))
                start = time.perf_counter()

    temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Trained(params, *state_bytes(method, state), temporary_bytes, seconds, curve)


# The translations.


@functools.partial(jax.jit, static_argnames="graphdef")
def write(graphdef: nnx.GraphDef, params: nnx.State, prompts: Array) -> Array:
    """The tokens of the translations, (B, TRANSLATION_TOKENS)."""
    model = nnx.merge(graphdef, params)
    cache = init_cache(model.config, len(prompts), prompts.shape[1] + TRANSLATION_TOKENS)
    return greedy(model, cache, prompts, prompts != PAD, TRANSLATION_TOKENS, EOS, PAD)


def translate(graphdef: nnx.GraphDef, params: nnx.State, data: Data, split: str) -> list[str]:
    prompts = [prompt(data.tokenizer, pair) for pair in data.pairs[split]]
    tokens = write(graphdef, params, pad(prompts, data.rows[split].shape[1], PAD))
    # The tokenizer leaves special tokens out of the text.
    return data.tokenizer.decode_batch(np.asarray(tokens).tolist(), skip_special_tokens=True)


def simple(data: Data, split: str) -> list[int]:
    """Which sentences to show first: of at least four words, those of the fewest tokens.

    The tokenizer spells words that were rare in training, and minutes do not teach those.
    """
    words = [len(pair.source.split()) for pair in data.pairs[split]]
    tokens = [len(prompt(data.tokenizer, pair)) for pair in data.pairs[split]]
    return sorted(range(len(words)), key=lambda i: (words[i] < 4, tokens[i]))


# The comparison.


def main(settings: Settings) -> None:
    start = time.perf_counter()
    s = settings
    try:
        s.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"output={s.output} cannot be a folder: {error.strerror}")

    data = load_data(s)
    config = GPT2Config(
        vocab_size=s.vocab_size,
        n_positions=s.length + TRANSLATION_TOKENS,
        n_embd=s.n_embd,
        n_layer=s.n_layer,
        n_head=s.n_head,
    )
    model = GPT2(config, rngs=nnx.Rngs(s.seed))
    if s.layerwise:
        model.stack()  # florax finds the scan over the blocks
    graphdef, params = nnx.split(model)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

    references = [pair.target for pair in data.pairs["test"]]
    runs, curves, translations = [], {}, {}
    for method in METHODS if s.method == "all" else (s.method,):
        trained = train(s, method, graphdef, params, data)
        curves[method] = trained.curve
        translations[method] = translate(graphdef, trained.params, data, "test")
        runs.append(
            {
                "method": method,
                "learning_rate": s.peak(method),
                "optimizer_bytes": trained.optimizer_bytes,
                "accumulator_bytes": trained.accumulator_bytes,
                "temporary_bytes": trained.temporary_bytes,
                "seconds": round(trained.seconds, 1),
                "test_loss": float(heldout_loss(graphdef, trained.params, data.rows["test"])),
                "bleu": sacrebleu.corpus_bleu(translations[method], [references]).score,
            }
        )

    for i in simple(data, "test")[:SHOWN]:
        pair = data.pairs["test"][i]
        print(f"\n{pair.source}\n  {'expected':9} {pair.target}")
        for method, texts in translations.items():
            print(f"  {method:9} {texts[i]}")

    header = ["method", "optimizer state", "accumulator", "temporaries", "seconds", "loss", "BLEU"]
    table = []
    for run in runs:
        sizes = [human(run[f"{kind}_bytes"]) for kind in ("optimizer", "accumulator", "temporary")]
        quality = [f"{run['test_loss']:.3f}", f"{run['bleu']:.1f}"]
        table.append([run["method"], *sizes, f"{run['seconds']:.0f}", *quality])
    print(f"\n{format_table(header, table)}\n")

    plot_curves(curves, s.output / "loss.png", "sentence pairs seen", "German to English")
    results = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(s).items()},
        "runs": runs,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (s.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {s.output}/loss.png and results.json after {results['seconds']:.0f} seconds")
    print(json.dumps(results))


if __name__ == "__main__":
    try:
        settings = tyro.cli(Settings, description=__doc__)
    except ValueError as mistake:  # new versions of tyro report it themselves
        sys.exit(f"error: {mistake}")
    try:
        main(settings)
    except KeyboardInterrupt:
        sys.exit("interrupted")

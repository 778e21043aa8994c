"""Convert a LLaMA model from a GGUF file, as llama.cpp reads it, to a Hugging Face folder.

    python examples/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python examples/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --dtype bfloat16

Quantised weights come out as the numbers they stand for; what quantising lost stays lost. The
folder holds the model, its settings and its tokenizer. It appears once it is complete; a file that
cannot be converted is refused with a sentence that says why, and nothing is written.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import gguf
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from florax_examples.models import checkpoints
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.models.llama import Llama, LlamaConfig
from florax_examples.settings import run

# How the tokenizers of this kind that have been compared cut a text before they merge its bytes.
# The pattern is GPT-2's, within which SmolLM takes each digit by itself.
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    # to convert: GGUF, in one part
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    # to write; an older checkpoint there is replaced
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights


def main(settings: Settings) -> None:
    fields, tensors = read(settings.file)
    files = tokenizer_files(fields)
    checkpoints.check_replaceable(settings.output, files)
    model = load(fields, tensors, jnp.dtype(settings.dtype))
    checkpoints.save(model, settings.output, files)
    count = sum(tensor.n_elements for tensor in tensors.values())
    print(f"wrote {settings.output}: {count:,} parameters, {settings.dtype}")


class Fields(dict[str, Any]):
    """The metadata of a file, where to ask for what is not there is a mistake of the file's."""

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"the file does not say {name}")


def read(file: Path) -> tuple[Fields, dict[str, gguf.ReaderTensor]]:
    """The metadata and the tensors by name; these stay in the file until they are looked at."""
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF file: {error}") from error
    fields = Fields((name, contents(field)) for name, field in reader.fields.items())
    if (architecture := fields["general.architecture"]) != "llama":
        raise CheckpointError(f"only the architecture 'llama' is converted, not {architecture!r}")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def contents(field: gguf.ReaderField) -> Any:
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # 1e-05, not the 9.999999747378752e-06 that it is
    return value


# The weights.


def read_config(fields: Fields, tensors: dict[str, gguf.ReaderTensor]) -> LlamaConfig:
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise CheckpointError(f"rotary positions of scaling type {scaling!r} are not converted")
    if "rope_freqs.weight" in tensors:
        raise CheckpointError("rotary positions scaled as in LLaMA 3.1 are not converted")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the file has no tensor token_embd.weight")

    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", width // heads)
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (given := fields.get(name, head_dim)) != head_dim:
            raise CheckpointError(f"{name} must be the {head_dim} of a key, got {given}")
    try:
        return LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),  # GGUF has columns first
            hidden_size=width,
            intermediate_size=fields["llama.feed_forward_length"],
            num_hidden_layers=fields["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=fields["llama.context_length"],
            rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            rope_theta=fields.get("llama.rope.freq_base", 10000.0),
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def load(fields: Fields, tensors: dict[str, gguf.ReaderTensor], dtype: jnp.dtype) -> Llama:
    config = read_config(fields, tensors)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), param_dtype=dtype))
    wanted = dict(nnx.to_flat_state(nnx.state(model)))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    suffixes = (".weight", ".bias")
    names = {path: table.get_name(Llama.tensor_name(path), suffixes) for path in wanted}
    for problem, found in [
        ("lacks", sorted(set(names.values()) - set(tensors))),
        ("has, beyond what LLaMA consists of,", sorted(set(tensors) - set(names.values()))),
    ]:
        if found:
            raise CheckpointError(f"the file {problem} {len(found)} tensors: {shorten(found)}")

    params = {}
    for path, parameter in wanted.items():
        tensor = dequantize(tensors[names[path]])
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.key_value_heads}
        if path[-2] in heads:
            tensor = half_split(tensor, heads[path[-2]])
        tensor = tensor.transpose(Llama.tensor_axes(path, tensor.ndim))
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{names[path]} should be of shape {parameter.shape}, got {tensor.shape}"
            )
        params[path] = jnp.asarray(tensor, dtype)
    nnx.update(model, nnx.from_flat_state(params))
    return model


def shorten(names: Sequence[str], most: int = 3) -> str:
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise CheckpointError(f"{tensor.name} is of type {kind}, which is not converted") from error


def half_split(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head from llama.cpp's order to Hugging Face's.

    A rotation turns pairs of rows: there the neighbours 2 i and 2 i + 1, here i and i + D / 2.
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


# The tokenizer.


def tokenizer_files(fields: Fields) -> dict[str, bytes]:
    """The files that transformers reads the tokenizer and the limits of generation from."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {
        kind: fields.get(f"tokenizer.ggml.{name}_token_id")
        for kind, name in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")]
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": tokens[i] for kind, i in ids.items() if i is not None},
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    generation = {f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad")}
    return {
        "tokenizer.json": make_tokenizer(fields, tokens, ids).to_str(pretty=True).encode(),
        "tokenizer_config.json": as_json(config),
        "generation_config.json": as_json(generation),
    }


def make_tokenizer(fields: Fields, tokens: list[str], ids: dict[str, int | None]) -> Tokenizer:
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            "only byte-level tokenizers, 'gpt2', that cut text like "
            f"{' or '.join(map(repr, PRE_TOKENIZERS))} are converted, not {kind!r} like {pre!r}"
        )
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()

    types = fields["tokenizer.ggml.token_type"]
    typed = list(zip(tokens, types, strict=True))
    for kind, add in [
        (gguf.TokenType.CONTROL, tokenizer.add_special_tokens),
        (gguf.TokenType.USER_DEFINED, tokenizer.add_tokens),
    ]:
        add([AddedToken(token, normalized=False) for token, own in typed if own == kind])

    ends = {kind: fields.get(f"tokenizer.ggml.add_{kind}_token", False) for kind in ("bos", "eos")}
    if any(ends.values()):
        begin, end = ([tokens[ids[kind]]] if added else [] for kind, added in ends.items())
        special = [(token, vocabulary[token]) for token in begin + end]
        tokenizer.post_processor = TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=special
        )
    return tokenizer


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


if __name__ == "__main__":
    run(main, Settings, __doc__)

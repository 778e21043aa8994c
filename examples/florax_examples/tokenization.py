"""Text to token ids and back: a tokenizer trained here, or the one beside a published model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

ROLES = ("bos", "eos", "pad")
GPT2_END = "<|endoftext|>"  # begins and ends a text
T5_SENTINELS = 100  # <extra_id_0>, ... have ids past the pieces of T5's file, and are not in it
# What says which tokens are special, by name or by id. What comes first counts.
SETTINGS = ("tokenizer_config", "special_tokens_map", "generation_config", "config")


class TokenizerError(ValueError):
    """What is wrong with a tokenizer's files, in a sentence for the user."""


class Vocabulary(NamedTuple):
    """What a tokenizer's own files say, read by `tokenizers` or `sentencepiece`."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    size: int
    token_to_id: Callable[[str], int | None]
    id_to_token: Callable[[int], str]
    special: Mapping[str, int | None]  # of some roles, where nothing else is said


class Tokenizer:
    """What `train` and `load` return.

    Attributes:
      vocab_size: number of ids, special tokens included. A model may have more embeddings.
      bos: the id that begins a text, or None.
      eos: the id that ends one, or None.
      pad: the id that fills up rows, or None. Where there is none of its own, as in GPT-2, it is
        that of `eos`: then padding is known by its place only.
      files: names and contents of the files that `load` makes the same tokenizer of.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        files: Mapping[str, bytes],
        settings: Sequence[Mapping[str, Any]],
    ):
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        special = {role: _special(role, vocabulary, settings) for role in ROLES}
        self.bos, self.eos = special["bos"], special["eos"]
        self.pad = self.eos if special["pad"] is None else special["pad"]

        names = {
            f"{role}_token": vocabulary.id_to_token(i)
            for role, i in special.items()
            if i is not None
        }
        config = json.dumps({**settings[0], **names}, indent=2).encode()
        self.files = {**files, "tokenizer_config.json": config}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; special tokens are left out."""
        special = (self.bos, self.eos, self.pad)
        return self._vocabulary.decode([int(i) for i in ids if i not in special])

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        return [self.decode(row) for row in rows]


def train(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ("<pad>", "<eos>")
) -> Tokenizer:
    """Train a byte-level BPE, which can spell any text.

    Args:
      texts: what to learn the vocabulary from.
      vocab_size: ids at most, special tokens included.
      special_tokens: they get the ids 0, 1, ...; <pad>, <bos> and <eos> are known by these names.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(alphabet) + len(special_tokens)):
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{role}_token": f"<{role}>" for role in ROLES if f"<{role}>" in special_tokens}
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return Tokenizer(_vocabulary(tokenizer, {}), files, [config])


def is_in(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer that `load` reads."""
    return _find(Path(folder)) is not None


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    It is tokenizer.json; or vocab.json and merges.txt, as of GPT-2; or a SentencePiece file:
    spiece.model, as of T5, or tokenizer.model, as of LLaMA. Which tokens are special is looked up
    in tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json.

    Raises:
      TokenizerError: there is none, it is not readable, or `sentencepiece` is not installed.
    """
    folder = Path(folder)
    names = _find(folder)
    if names is None:
        raise TokenizerError(
            f"{folder} has no tokenizer: no tokenizer.json, no vocab.json with merges.txt, no "
            "spiece.model and no tokenizer.model"
        )
    paths = [folder / name for name in names]
    try:
        settings = [_read_settings(folder / f"{name}.json") for name in SETTINGS]
        files = {path.name: path.read_bytes() for path in paths}
        return Tokenizer(_FORMATS[names](*paths, settings[0]), files, settings)
    except TokenizerError:
        raise
    except Exception as error:  # `tokenizers` raises nothing more special
        raise TokenizerError(f"the tokenizer in {folder} is not readable: {error}") from error


def _find(folder: Path) -> tuple[str, ...] | None:
    """The files of the first known format that the folder has."""
    return next(
        (names for names in _FORMATS if all((folder / name).is_file() for name in names)), None
    )


def _read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _special(
    role: str, vocabulary: Vocabulary, settings: Sequence[Mapping[str, Any]]
) -> int | None:
    for own in settings:
        name = own.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and (i := vocabulary.token_to_id(name)) is not None:
            return i
        i = own.get(f"{role}_token_id")
        if isinstance(i, list):  # several that end a text
            i = i[0]
        if i is not None and 0 <= i < vocabulary.size:  # LLaMA's files have -1 for none
            return i
    return vocabulary.special.get(role)


# Of `tokenizers`.


def _vocabulary(tokenizer: tokenizers.Tokenizer, special: Mapping[str, int | None]) -> Vocabulary:
    return Vocabulary(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=tokenizer.decode,  # leaves special tokens out by itself
        size=tokenizer.get_vocab_size(),
        token_to_id=tokenizer.token_to_id,
        id_to_token=tokenizer.id_to_token,
        special=special,
    )


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_json(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # with which some files were saved
    tokenizer.no_padding()
    return _vocabulary(tokenizer, {})


def _read_gpt2(vocab: Path, merges: Path, config: Mapping[str, Any]) -> Vocabulary:
    tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    end = tokenizer.token_to_id(GPT2_END)
    if end is not None:
        tokenizer.add_special_tokens([GPT2_END])  # one token, also in a text
    return _vocabulary(tokenizer, {"bos": end, "eos": end})


# Of `sentencepiece`.


def _read_t5(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    vocabulary = _read_sentencepiece(path, config)
    return vocabulary._replace(size=vocabulary.size + config.get("extra_ids", T5_SENTINELS))


def _read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise TokenizerError(
            f"{path} is read by the package sentencepiece, which is not installed: "
            "pip install sentencepiece"
        ) from None
    pieces = SentencePieceProcessor(model_file=str(path))
    count = pieces.vocab_size()
    special = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}

    def is_text(i: int) -> bool:
        return i < count and not pieces.is_control(i) and not pieces.is_unknown(i)

    def token_to_id(token: str) -> int | None:
        i = pieces.piece_to_id(token)  # that of the unknown one for what it does not have
        return i if pieces.id_to_piece(i) == token else None

    return Vocabulary(
        encode=pieces.encode,
        decode=lambda ids: pieces.decode([i for i in ids if is_text(i)]),
        size=count,
        token_to_id=token_to_id,
        id_to_token=pieces.id_to_piece,
        special={role: i for role, i in special.items() if i >= 0},
    )


_FORMATS: dict[tuple[str, ...], Callable[..., Vocabulary]] = {
    ("tokenizer.json",): _read_json,
    ("vocab.json", "merges.txt"): _read_gpt2,
    ("spiece.model",): _read_t5,
    ("tokenizer.model",): _read_sentencepiece,
}

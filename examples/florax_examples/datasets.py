"""Where the data of a script come from: a local folder, or a known set of the Hugging Face hub.

A folder has a file a split, named train, validation (or valid, val, dev) and test (or test2016):

    texts   .jsonl.gz or .jsonl, in each line an object with `text`; or .txt.gz or .txt, one text
    pairs   .jsonl.gz or .jsonl, in each line an object with `source`, `target` and, where there is
            more than one right answer, `references`
    images  .npz with `images` (uint8, N × height × width and perhaps × channels), `labels` (N
            numbers) and `class_names`
"""

import functools
import gzip
import itertools
import json
import operator
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

FOLDER = Path(__file__).parents[1] / "data"  # what comes with the repository
FILE_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "test2016"),
}
LINES = (".jsonl.gz", ".jsonl")
TEXTS = (*LINES, ".txt.gz", ".txt")


class DataError(ValueError):
    """What is wrong with the data, in a sentence for the user."""


class Pair(NamedTuple):
    source: str
    target: str
    references: tuple[str, ...]  # all right answers, `target` among them


class Images(NamedTuple):
    images: np.ndarray  # (N, height, width, channels), uint8
    labels: np.ndarray  # (N,), int32
    class_names: tuple[str, ...]


Kind = Literal["texts", "pairs", "images"]


class Hub(NamedTuple):
    """A data set of the Hugging Face hub."""

    kind: Kind
    columns: tuple[str, ...]  # text; source and target; image and label
    splits: tuple[str, ...]
    options: Mapping[str, Any]  # of `datasets.load_dataset`


def _converted(config: str) -> dict[str, str]:
    # What is published as a script, `datasets` reads no longer; the hub has it as files too.
    return {"revision": "refs/convert/parquet", "data_dir": config}


SPLITS = ("train", "validation", "test")
HUB = {
    "allenai/c4": Hub(
        "texts", ("text",), ("train", "validation"), {"name": "en", "streaming": True}
    ),
    "EdinburghNLP/xsum": Hub("pairs", ("document", "summary"), SPLITS, _converted("default")),
    "IWSLT/iwslt2017": Hub(
        "pairs", ("translation.de", "translation.en"), SPLITS, _converted("iwslt2017-de-en")
    ),
    "uoft-cs/cifar100": Hub("images", ("img", "fine_label"), ("train", "test"), {}),
}


def has_pairs(data: str | Path) -> bool:
    """Whether these are pairs, for a script that takes texts too."""
    if not Path(data).is_dir():
        pairs = [name for name, hub in HUB.items() if hub.kind == "pairs"]
        return _find_name(data, pairs) is not None
    path = _find(Path(data), "train", TEXTS)
    return path.name.endswith(LINES) and "source" in _objects(path, (), 1)[0]


def load_texts(data: str | Path, split: str, limit: int | None = None) -> list[str]:
    """The texts of a split.

    Where the hub has no test split, validation is cut in two: test is what follows the first
    `limit` texts, or the second half.

    Args:
      data: a folder, or a name in `HUB`, with or without its owner.
      split: "train", "validation" or "test".
      limit: how many to read at most, the first ones; None means all.

    Raises:
      DataError: they cannot be had; it says why in a sentence.
    """
    if (name := _hub_name(data, "texts")) is not None:
        if split == "train" or "test" in HUB[name].splits:
            return [text for (text,) in _hub_rows(name, split, limit)[0]]
        both = [text for (text,) in _hub_rows(name, "validation", limit and 2 * limit)[0]]
        half = len(both) // 2
        return both[:half] if split == "validation" else both[half:]
    path = _find(Path(data), split, TEXTS)
    if path.name.endswith(LINES):
        return [item["text"] for item in _objects(path, ("text",), limit)]
    if not (text := "".join(_lines(path))):
        raise DataError(f"{path} is empty")
    return [text]


def load_pairs(data: str | Path, split: str, limit: int | None = None) -> list[Pair]:
    """The pairs of a split; the arguments are those of `load_texts`."""
    if (name := _hub_name(data, "pairs")) is not None:
        rows, _ = _hub_rows(name, split, limit)
        return [Pair(source, target, (target,)) for source, target in rows]
    path = _find(Path(data), split, LINES)
    pairs = []
    for item in _objects(path, ("source", "target"), limit):
        references = item.get("references", [item["target"]])
        if not isinstance(references, list) or item["target"] not in references:
            raise DataError(f"{path}: references must be a list with the target, got {references}")
        pairs.append(Pair(item["source"], item["target"], tuple(references)))
    return pairs


def load_images(data: str | Path, split: str, limit: int | None = None) -> Images:
    """The images of a split; the arguments are those of `load_texts`.

    Where there are only train and test, the last tenth of train is validation, and train is what
    comes before it.
    """
    name = _hub_name(data, "images")
    if name is not None:
        cut = split != "test" and "validation" not in HUB[name].splits
        all_images = _hub_images(name, "train" if cut else split, None if cut else limit)
    else:
        cut = split != "test" and not _files(Path(data), "validation", (".npz",))
        all_images = _read_images(_find(Path(data), "train" if cut else split, (".npz",)))
    images, labels, class_names = all_images
    if cut:
        first = len(images) - len(images) // 10
        part = slice(first) if split == "train" else slice(first, None)
        images, labels = images[part], labels[part]
    return Images(images[:limit], labels[:limit], class_names)


# Folders.


def _files(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    paths = [folder / f"{name}{suffix}" for name in FILE_NAMES[split] for suffix in suffixes]
    return [path for path in paths if path.is_file()]


def _find(folder: Path, split: str, suffixes: Sequence[str]) -> Path:
    if files := _files(folder, split, suffixes):
        return files[0]
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(tuple(suffixes)))
    raise DataError(
        f"{folder} has no {split} split: it needs a file {split}{suffixes[0]}, and has "
        f"{', '.join(others) or 'none of that kind'}"
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} is not readable: {error}") from error


def _objects(path: Path, keys: Sequence[str], limit: int | None) -> list[dict[str, Any]]:
    """The objects in the first lines of a file, all with texts under these keys."""
    items = []
    for number, line in enumerate(itertools.islice(_lines(path), limit), start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
            has = ", ".join(item) if isinstance(item, dict) else type(item).__name__
            needs = " and ".join(keys)
            raise DataError(f"{path}, line {number}: needs texts under {needs}, has {has}")
        items.append(item)
    if not items:
        raise DataError(f"{path} is empty")
    return items


def _read_images(path: Path) -> Images:
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not readable: {error}") from error
    if missing := {"images", "labels", "class_names"} - arrays.keys():
        missing, has = ", ".join(sorted(missing)), ", ".join(arrays)
        raise DataError(f"{path} lacks the arrays {missing}, has {has or 'none'}")
    images, labels, names = arrays["images"], arrays["labels"], arrays["class_names"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise DataError(
            f"{path}: images must be uint8 of shape (N, height, width) or (N, height, width, "
            f"channels), got {images.dtype} of shape {images.shape}"
        )
    if labels.shape != images.shape[:1] or not np.isin(labels, np.arange(len(names))).all():
        raise DataError(
            f"{path}: labels must be {len(images)} numbers from 0 to {len(names) - 1}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    return _images(images, labels, names)


def _images(images: np.ndarray, labels: np.ndarray, class_names: Iterable[str]) -> Images:
    if images.ndim == 3:
        images = images[..., None]
    return Images(images, labels.astype(np.int32), tuple(map(str, class_names)))


# The hub.


def _hub_name(data: str | Path, kind: Kind) -> str | None:
    """The key of `HUB` that `data` means; None if it is a folder."""
    if Path(data).is_dir():
        return None
    names = [name for name, hub in HUB.items() if hub.kind == kind]
    if (name := _find_name(data, names)) is not None:
        return name
    raise DataError(
        f"there is no folder {data}, and the data sets of the Hugging Face hub that are known "
        f"here as {kind} are {', '.join(names)}"
    )


def _find_name(data: str | Path, names: Iterable[str]) -> str | None:
    return next((name for name in names if str(data) in (name, name.split("/")[1])), None)


def _hub_rows(name: str, split: str, limit: int | None) -> tuple[list[list[Any]], Any]:
    """The columns of the first rows, and what `datasets` knows of them."""
    hub = HUB[name]
    if split not in hub.splits:
        raise DataError(f"{name} has no {split} split, only {' and '.join(hub.splits)}")
    if hub.options.get("streaming") and limit is None:
        raise DataError(f"{name} is too large to be read whole: say how much of it")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is on the Hugging Face hub, and the package that reads it is not installed: "
            "pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split, **hub.options)
        values = [_columns(row, hub.columns) for row in itertools.islice(rows, limit)]
    # Errors of a dozen kinds: of `datasets`, of the hub's own package and of its HTTP client.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{name} cannot be read from the Hugging Face hub: {reason}") from error
    return values, rows.features


def _columns(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """What is under each of `columns`, where `a.b` means b in a."""
    return [functools.reduce(operator.getitem, column.split("."), row) for column in columns]


def _hub_images(name: str, split: str, limit: int | None) -> Images:
    rows, features = _hub_rows(name, split, limit)
    images, labels = zip(*rows, strict=True)
    class_names = features[HUB[name].columns[1]].names
    return _images(np.stack([np.asarray(image) for image in images]), np.array(labels), class_names)

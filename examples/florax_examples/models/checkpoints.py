"""Checkpoints as folders of Hugging Face: config.json, safetensors, and a tokenizer's files.

A model class of this folder says how its checkpoints look:

    Config, model_type, architecture   of config.json
    tensor_name(path)                  of the parameter at a path of the unstacked model
    tensor_axes(path, ndim)            how to transpose a tensor into the parameter
    base_prefix                        what files of the model without its head leave out of names
    ignored_tensors                    regular expressions of tensors that are no parameters
    other_names, if there are any      from names that some files have instead to those they should

A folder has each tensor that the model needs, in its shape, and no other, or it is refused.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType, MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax import Array

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
SHARD = "model-{:05d}-of-{:05d}.safetensors"
DOWNLOADED = ("*.json", WEIGHTS, "model-*-of-*.safetensors", "*.model", "*.txt")
OTHER_WEIGHTS = ("pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack", "*.gguf", "*.ckpt*")
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """What is wrong with a checkpoint: a sentence for whoever named it."""


def resolve(name: str | Path) -> Path:
    """The folder `name`, or that of the model `name` on the Hugging Face hub, downloaded once."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name} is a file, not a folder with a {CONFIG}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        raise CheckpointError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {name}, and to look for it on the Hugging Face hub takes "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of its own, of its HTTP library, of the disk: no common base
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"there is no folder {name}, and the Hugging Face hub does not give it: "
            f"{type(error).__name__}: {reason}"
        ) from error


def read_config(folder: str | Path, model_class: Any) -> Any:
    """The `model_class.Config` that the folder's config.json describes."""
    path = Path(folder) / CONFIG
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    config = _read_json(path)
    kind = config.get("model_type")
    if kind is None and model_class.architecture in (config.get("architectures") or ()):
        kind = model_class.model_type
    if kind != model_class.model_type:
        raise CheckpointError(
            f"{path} describes a model of type {kind!r}, not {model_class.model_type!r}"
        )
    try:
        return model_class.Config.from_huggingface(config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error


def load(
    folder: str | Path,
    model_class: Any,
    *,
    config: Any = None,
    fresh: Collection[str] = (),
    rngs: nnx.Rngs | None = None,
    stacked: bool = False,
    **options: Any,
) -> Any:
    """Build a model with the weights of a folder.

    Arrays are made on the host, stacked there if need be, and go to the device one by one, each
    once: a model never exists there twice. They get the dtype that the option `param_dtype` says,
    float32 by default, whatever dtype the folder has them in.

    The head of a language model is tied to the embedding where the folder has a head that equals
    it, and is not where it has another, whatever config.json says; without a head, config.json is
    right: tied, or incomplete.

    Args:
      folder: has config.json, and model.safetensors or several files and their index.
      model_class: a model of this folder, such as `florax_examples.models.gpt2.GPT2`.
      config: what to build, where that differs from what config.json describes: say, other classes.
      fresh: regular expressions. A tensor that one of them matches in full is drawn anew from
        `rngs`, whatever the folder has: say, the classifier of other classes.
      rngs: for `fresh`; None means that of seed 0.
      stacked: whether the layers are stacked, as by `model.stack()`.
      **options: of `model_class`: dtype, param_dtype, checkpoint.

    Raises:
      CheckpointError: the folder is no such checkpoint.
    """
    folder = Path(folder)
    described = read_config(folder, model_class)
    key = (rngs or nnx.Rngs(0)).params()
    with contextlib.ExitStack() as files:
        found = _open(folder, model_class, files)
        found = {name: tensor for name, tensor in found.items() if not _matches(fresh, name)}
        config = _settle_tie(config or described, found)

        def build() -> Any:
            return model_class(config, rngs=nnx.Rngs(key), **options)

        def build_in_form() -> Any:
            model = build()
            if stacked:
                model.stack()
            return model

        _check_layers(folder, config, found)
        try:
            model = nnx.eval_shape(build_in_form)
        except (TypeError, ValueError, OverflowError) as error:  # of sizes that no array has
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{folder / CONFIG} describes a model that cannot be built: {reason}"
            ) from error
        places = _places(model)
        drawn = _draw(build, fresh) if fresh else {}
        _check(folder, {name: place for name, place in places.items() if name not in drawn}, found)

        def read(name: str) -> np.ndarray | Array:
            if name in drawn:
                return drawn[name]
            return found[name].read().transpose(places[name].axes)

        values = _gather(_params(model), places, read)
    nnx.update(model, nnx.from_flat_state(values))
    return model


def save(
    model: Any,
    folder: str | Path,
    files: Mapping[str, bytes] = MappingProxyType({}),
    *,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a model, stacked or not, as a folder that `load` and transformers read.

    The folder is written aside and renamed once it is complete, in the place of an older one.

    Args:
      model: its LoRA adapters, if any, must be merged.
      folder: where to write; the folders above it are made.
      files: what else the folder holds, by name: the tokenizer's files.
      max_shard_size: bytes of a file of weights; more are split into several.

    Raises:
      CheckpointError: the folder cannot be written, or see `check_replaceable`.
    """
    folder = Path(folder).resolve()
    params = _params(model)
    if any(isinstance(param, nnx.LoRAParam) for param in params.values()):
        raise ValueError("a model with adapters has no checkpoint format: see models.lora.merge")
    check_replaceable(folder, files)

    dtypes = {str(param.dtype) for param in params.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    config = model.config.to_huggingface() | {
        "architectures": [model.architecture],
        "model_type": model.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name in transformers 4
    }
    places = _places(model)
    with _written_aside(folder) as aside:
        _write_json(aside / CONFIG, config)
        shards = _shards(places, max_shard_size)
        for file, names in shards.items():
            tensors = {name: _tensor(params, places[name]) for name in names}
            safetensors.numpy.save_file(tensors, aside / file, metadata={"format": "pt"})
            shutil.copymode(aside / CONFIG, aside / file)  # safetensors keeps it to its owner
        if len(shards) > 1:
            sizes = {
                "total_size": sum(place.bytes for place in places.values()),
                "total_parameters": sum(math.prod(place.shape) for place in places.values()),
            }
            index = {name: file for file, names in shards.items() for name in names}
            _write_json(aside / INDEX, {"metadata": sizes, "weight_map": index})
        for name, content in files.items():
            (aside / name).write_bytes(content)


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` once it is complete."""
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():  # left by a process that was killed
            shutil.rmtree(aside)
        aside.mkdir()
        yield aside
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        if old.exists() and not folder.exists():  # cut short between the two
            old.rename(folder)
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_replaceable(folder: str | Path, files: Collection[str] = ()) -> None:
    """Raise CheckpointError if to save to `folder`, with `files`, would delete anything else."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, where a folder is to be written")
    own = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if others := [name for name in names if name not in files and not own.fullmatch(name)]:
        raise CheckpointError(
            f"{folder} holds {_shorten(others)}, which a checkpoint in its place would delete: "
            "choose another folder"
        )


# Where the parameters are.


class _Place(NamedTuple):
    """Where a tensor of a checkpoint belongs in a model."""

    path: tuple  # of the parameter
    index: int | EllipsisType  # its layer, if they are stacked
    axes: tuple[int, ...]  # that transpose it into the parameter, or into one layer of it
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _params(model: Any) -> dict[tuple, nnx.Variable]:
    return dict(nnx.to_flat_state(nnx.state(model)))


def _places(model: Any) -> dict[str, _Place]:
    """Of all tensors of a checkpoint of the model, which may be abstract."""
    own = unstacked = _params(model)
    if not any(_layer_of(path) is not None for path in own):
        graphdef, state = nnx.split(model)

        def unstack(state: nnx.State) -> nnx.State:
            model = nnx.merge(graphdef, state)
            model.unstack()
            return nnx.state(model)

        unstacked = dict(nnx.to_flat_state(jax.eval_shape(unstack, state)))

    places = {}
    for path, param in unstacked.items():
        index: int | EllipsisType = ...
        axes = model.tensor_axes(path, param.ndim)
        shape = tuple(param.shape[axis] for axis in np.argsort(axes))
        name = model.tensor_name(path)
        if path not in own:
            index = _layer_of(path)
            path = tuple(key for key in path if not isinstance(key, int))
        places[name] = _Place(path, index, axes, shape, np.dtype(param.dtype))
    return places


def _draw(build: Callable[[], Any], fresh: Collection[str]) -> dict[str, Array]:
    """New values of the tensors that `fresh` matches, by their names."""

    def draw() -> dict[str, Array]:
        model = build()
        named = {model.tensor_name(path): param[...] for path, param in _params(model).items()}
        return {name: array for name, array in named.items() if _matches(fresh, name)}

    return jax.jit(draw)()  # XLA leaves out what is not asked for


def _gather(
    params: Mapping[tuple, nnx.Variable],
    places: Mapping[str, _Place],
    read: Callable[[str], np.ndarray | Array],
) -> dict[tuple, Array]:
    """The parameters' values, each made on the host of all its tensors."""
    names: dict[tuple, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place.path, []).append(name)
    values = {}
    for path, param in params.items():
        host = np.empty(param.shape, param.dtype)
        for name in names[path]:
            host[places[name].index] = read(name)
        values[path] = jnp.asarray(host)
    return values


def _tensor(params: Mapping[tuple, nnx.Variable], place: _Place) -> np.ndarray:
    """What a checkpoint has of the parameters at a place."""
    array = params[place.path][...]
    if place.index is not ...:
        array = _layer(array, place.index)
    # Safetensors writes a view's bytes in the order of what it is a view of.
    return np.ascontiguousarray(np.asarray(array).transpose(np.argsort(place.axes)))


def _layer_of(path: tuple) -> int | None:
    return next((key for key in path if isinstance(key, int)), None)


@jax.jit
def _layer(stacked: Array, index: Array) -> Array:
    return stacked[index]  # as an argument: one program for all layers


def _shards(places: Mapping[str, _Place], most: int) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    groups: list[list[str]] = []
    room = 0
    for name, place in places.items():
        if not groups or place.bytes > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= place.bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {SHARD.format(i, len(groups)): names for i, names in enumerate(groups, start=1)}


# What is in the files.


class _Tensor(NamedTuple):
    file: Path
    name: str  # in the file
    opened: Any  # the file, of safetensors

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.opened.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.opened.get_tensor(self.name)


def _open(folder: Path, model_class: Any, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """The tensors of the folder, none of them read yet, by the names that they should have."""
    tensors = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, which {INDEX} names")
        try:
            opened = files.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is no complete safetensors file: {error}") from error
        names = opened.keys()
        tensors.update({name: _Tensor(path, name, opened) for name in names})

    prefix = model_class.base_prefix
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name == HEAD else prefix + name: own for name, own in tensors.items()}
    for name, right in getattr(model_class, "other_names", {}).items():
        if name in tensors:
            tensors.setdefault(right, tensors.pop(name))
    ignored = model_class.ignored_tensors
    tensors = {name: own for name, own in tensors.items() if not _matches(ignored, name)}
    for tensor in tensors.values():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is stored as {tensor.dtype}; only weights stored "
                f"as {', '.join(FLOATS)} are read"
            )
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise CheckpointError(
                    f"{folder / INDEX} names {name!r}, which is no file beside it"
                )
        return [folder / name for name in sorted(set(weight_map.values()))]
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    also = f"; {_shorten(others)} cannot be read, only safetensors can" if others else ""
    raise CheckpointError(f"{folder} has no {WEIGHTS}{also}")


def _settle_tie(config: Any, found: dict[str, _Tensor]) -> Any:
    """The config with the tie that the tensors have; a head that is the embedding is taken out."""
    if HEAD not in found or not hasattr(config, "tie_word_embeddings"):
        return config
    shape, head = found[HEAD].shape, found[HEAD].read()
    twins = (own for name, own in found.items() if name != HEAD and own.shape == shape)
    tied = any(np.array_equal(head, twin.read()) for twin in twins)
    if tied:
        del found[HEAD]
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _check_layers(folder: Path, config: Any, found: Mapping[str, _Tensor]) -> None:
    """Before a model of as many layers is built, be it of shapes only."""
    for field in dataclasses.fields(config):
        count = getattr(config, field.name)
        if "layer" in field.name and isinstance(count, int) and count > len(found):
            raise CheckpointError(
                f"{folder} has {len(found)} tensors, too few for {field.name}={count}"
            )


def _check(folder: Path, places: Mapping[str, _Place], found: Mapping[str, _Tensor]) -> None:
    problems = []
    if missing := [name for name in places if name not in found]:
        problems.append(f"lacks {_shorten(missing)}")
    if surplus := [name for name in found if name not in places]:
        problems.append(f"has, of which the model knows nothing, {_shorten(surplus)}")
    if problems:
        raise CheckpointError(f"{folder} {'; it '.join(problems)}")
    wrong = [
        f"{name} of shape {found[name].shape} instead of {place.shape}"
        for name, place in places.items()
        if found[name].shape != place.shape
    ]
    if wrong:
        raise CheckpointError(f"{folder} has {_shorten(wrong)}")


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _shorten(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

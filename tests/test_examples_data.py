"""What the scripts in `examples/` share: data, tokenizers and metrics."""

import gzip
import json
import shutil
import sys
import types
from pathlib import Path

import extras
import numpy as np
import pytest

extras.need("examples")

import sacrebleu

from florax_examples import datasets, metrics, tokenization
from florax_examples.datasets import DataError, Pair, load_images, load_pairs, load_texts
from florax_examples.tokenization import TokenizerError

DATA = Path(__file__).parents[1] / "examples" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"
SPLITS = ("train", "validation", "test")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")


def write_lines(path, items):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def write_images(path, count, shape=(2, 3), **changes):
    images = np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape))
    arrays = {
        "images": np.broadcast_to(images, (count, *shape)),
        "labels": np.arange(count) % 3,
        "class_names": np.array(["cat", "dog", "ox"]),
    }
    np.savez_compressed(path, **arrays | changes)


# The data of the repository.


def test_data_of_the_repository_is_read_whole():
    counts = {split: len(load_pairs(DATA / "scitldr", split)) for split in SPLITS}
    assert counts == {"train": 1992, "validation": 619, "test": 618}
    counts = {split: len(load_texts(DATA / "tinystories", split)) for split in SPLITS}
    assert counts == {"train": 3642, "validation": 200, "test": 200}
    counts = {split: load_images(DATA / "fashion_mnist", split).images.shape for split in SPLITS}
    assert counts == {
        "train": (3060, 28, 28, 1),
        "validation": (340, 28, 28, 1),
        "test": (1000, 28, 28, 1),
    }


def test_data_of_the_repository_is_small_and_has_its_licences():
    folders = ["scitldr", "fashion_mnist", "tinystories", "stories260k"]
    files = [file for folder in folders for file in (DATA / folder).iterdir()]
    assert sum(file.stat().st_size for file in files) < 5.5e6
    for folder in folders:
        assert "**Attribution and licence.**" in (DATA / folder / "README.md").read_text("utf-8")


def test_clothes_are_of_each_class_alike():
    for split in SPLITS:
        _, labels, names = load_images(DATA / "fashion_mnist", split)
        assert len(names) == 10
        assert len(set(np.bincount(labels, minlength=10))) == 1


def test_abstracts_of_test_have_several_summaries():
    pairs = load_pairs(DATA / "scitldr", "test")
    assert all(pair.references[0] == pair.target for pair in pairs)
    assert min(len(pair.references) for pair in pairs) == 2


# Folders.


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_files_of_a_split_may_have_several_names(tmp_path, name, suffix):
    write_lines(tmp_path / f"{name}{suffix}", [{"text": "ä"}, {"text": "b"}])
    assert load_texts(tmp_path, "validation") == ["ä", "b"]
    assert load_texts(str(tmp_path), "validation", limit=1) == ["ä"]


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "train.txt").write_text("a\n\nb\n", encoding="utf-8")
    with gzip.open(tmp_path / "test.txt.gz", "wt", encoding="utf-8") as file:
        file.write("c\n")
    assert load_texts(tmp_path, "train") == ["a\n\nb\n"]
    assert load_texts(tmp_path, "test") == ["c\n"]
    (tmp_path / "dev.txt").touch()
    assert error_of(load_texts, tmp_path, "validation") == f"{tmp_path}/dev.txt is empty"


def test_pairs_have_their_target_for_reference_if_no_other(tmp_path):
    several = {"source": "a", "target": "b", "references": ["b", "c"], "id": 3}
    write_lines(tmp_path / "test2016.jsonl", [several, {"source": "d", "target": "e"}])
    expected = [Pair("a", "b", ("b", "c")), Pair("d", "e", ("e",))]
    assert load_pairs(tmp_path, "test") == expected
    assert load_pairs(tmp_path, "test", limit=1) == expected[:1]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3)])
def test_images_have_channels_last(tmp_path, shape):
    write_images(tmp_path / "test.npz", 5, shape)
    images, labels, names = load_images(tmp_path, "test", limit=4)
    assert images.shape == (4, 2, 3, 3 if shape == (2, 3, 3) else 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert list(labels) == [0, 1, 2, 0]
    assert names == ("cat", "dog", "ox")


def test_last_tenth_of_train_is_validation_where_there_is_none(tmp_path):
    write_images(tmp_path / "train.npz", 25)
    train, validation = (load_images(tmp_path, split) for split in ("train", "validation"))
    assert list(train.images[:, 0, 0, 0]) == list(range(23))
    assert list(validation.images[:, 0, 0, 0]) == [23, 24]
    assert list(validation.labels) == [23 % 3, 24 % 3]
    assert len(load_images(tmp_path, "train", limit=24).images) == 23

    write_images(tmp_path / "val.npz", 4)
    assert len(load_images(tmp_path, "train").images) == 25
    assert len(load_images(tmp_path, "validation").images) == 4


def error_of(load, *arguments):
    with pytest.raises(DataError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_does_not_exist_is_named():
    message = error_of(load_pairs, "no/where", "train")
    assert message.startswith("there is no folder no/where")
    assert message.endswith("known here as pairs are EdinburghNLP/xsum, IWSLT/iwslt2017")


def test_a_missing_split_is_named_with_what_there_is(tmp_path):
    write_lines(tmp_path / "train.jsonl.gz", [{"text": "a"}])
    write_lines(tmp_path / "other.jsonl", [{"text": "a"}])
    assert error_of(load_texts, tmp_path, "test") == (
        f"{tmp_path} has no test split: it needs a file test.jsonl.gz, and has other.jsonl, "
        "train.jsonl.gz"
    )
    message = error_of(load_images, tmp_path, "test")
    assert message.endswith("it needs a file test.npz, and has none of that kind")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.jsonl is empty"),
        (b'{"text": "a"}\n{"text": ', "train.jsonl, line 2: no JSON"),
        (b'{"text": "\xff"}\n', "train.jsonl is not readable: "),
        (b'{"source": "a", "target": "b"}\n', "line 1: needs texts under text, has source, target"),
        (b'{"text": 3}\n', "line 1: needs texts under text, has text"),
        (b"[1]\n", "line 1: needs texts under text, has list"),
    ],
)
def test_what_is_wrong_with_a_file_of_texts_is_said(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    assert message in error_of(load_texts, tmp_path, "train")


def test_what_is_wrong_with_a_file_of_pairs_is_said(tmp_path):
    file = tmp_path / "train.jsonl"
    write_lines(file, [{"text": "a"}])
    assert "needs texts under source and target, has text" in error_of(
        load_pairs, tmp_path, "train"
    )
    for references in ("b", [], ["c"]):
        write_lines(file, [{"source": "a", "target": "b", "references": references}])
        message = error_of(load_pairs, tmp_path, "train")
        assert "references must be a list with the target" in message


@pytest.mark.parametrize(
    "content",
    [b"text", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9]],
    ids=["no archive", "cut off"],
)
def test_a_damaged_archive_is_not_readable(tmp_path, content):
    (tmp_path / "train.jsonl.gz").write_bytes(content)
    (tmp_path / "train.npz").write_bytes(content)
    for load in (load_texts, load_images):
        assert " is not readable: " in error_of(load, tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 2, 3))}, "images must be uint8 .* got float64 of shape"),
        ({"images": np.zeros((4, 6), np.uint8)}, r"got uint8 of shape \(4, 6\)"),
        ({"labels": np.zeros(3, int)}, "labels must be 4 numbers from 0 to 2, got int64 of shape"),
        ({"labels": np.array([0, 1, 2, 3])}, "labels must be 4 numbers from 0 to 2"),
    ],
)
def test_what_is_wrong_with_a_file_of_images_is_said(tmp_path, changes, message):
    write_images(tmp_path / "test.npz", 4, **changes)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path, "test")


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "test.npz", images=np.zeros((4, 2, 3), np.uint8), x=0)
    message = error_of(load_images, tmp_path, "test")
    assert message.endswith("lacks the arrays class_names, labels, has images, x")


# The hub.


class Rows(list):
    """What `datasets` returns."""

    features = types.MappingProxyType(
        {"fine_label": types.SimpleNamespace(names=["cat", "dog", "ox"])}
    )


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, which keeps what it was asked for."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return Rows(
            {
                "text": f"text {i}",
                "document": f"document {i}",
                "summary": f"summary {i}",
                "translation": {"de": f"Satz {i}", "en": f"sentence {i}"},
                "img": np.full((2, 2, 3), i, np.uint8),
                "fine_label": i % 3,
            }
            for i in range(20)
        )

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_columns_of_the_hub_become_texts_pairs_and_images(hub):
    assert load_texts("allenai/c4", "train", limit=2) == ["text 0", "text 1"]
    assert load_pairs("EdinburghNLP/xsum", "test")[3] == Pair(
        "document 3", "summary 3", ("summary 3",)
    )
    assert load_pairs("iwslt2017", "validation", limit=1) == [
        Pair("Satz 0", "sentence 0", ("sentence 0",))
    ]
    train, validation, test = (load_images("cifar100", split) for split in SPLITS)
    assert train.images.shape == (18, 2, 2, 3)
    assert list(validation.images[:, 0, 0, 0]) == [18, 19]
    assert list(test.labels[:4]) == [0, 1, 2, 0]
    assert test.class_names == ("cat", "dog", "ox")

    converted = {"revision": "refs/convert/parquet"}
    assert hub == [
        ("allenai/c4", {"split": "train", "name": "en", "streaming": True}),
        ("EdinburghNLP/xsum", {"split": "test", "data_dir": "default", **converted}),
        ("IWSLT/iwslt2017", {"split": "validation", "data_dir": "iwslt2017-de-en", **converted}),
        ("uoft-cs/cifar100", {"split": "train"}),
        ("uoft-cs/cifar100", {"split": "train"}),
        ("uoft-cs/cifar100", {"split": "test"}),
    ]


def test_what_the_hub_does_not_have_is_said_without_asking_it(hub):
    assert "too large to be read whole" in error_of(load_texts, "c4", "train")
    assert not hub


def test_what_has_no_test_split_gives_the_later_half_of_validation(hub):
    validation, test = (load_texts("c4", split, limit=2) for split in ("validation", "test"))
    assert validation == ["text 0", "text 1"]
    assert test == ["text 2", "text 3"]


def test_a_hub_out_of_reach_is_said_in_a_sentence(hub, monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    assert error_of(load_pairs, "xsum", "train") == (
        "EdinburghNLP/xsum cannot be read from the Hugging Face hub: no route to host"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    message = error_of(load_pairs, "xsum", "train")
    assert message.endswith("is not installed: pip install datasets")


def test_known_sets_have_the_columns_of_their_kind():
    columns = {"texts": 1, "pairs": 2, "images": 2}
    for name, hub in datasets.HUB.items():
        assert len(hub.columns) == columns[hub.kind], name
        assert set(hub.splits) <= set(SPLITS)


# Tokenizers.


@pytest.fixture(scope="module")
def texts():
    return load_texts(DATA / "tinystories", "validation")


@pytest.fixture(scope="module")
def trained(texts):
    return tokenization.train(texts, 400, ("<pad>", "<sep>", "<eos>"))


ODD = "Größe 日本語 ∑ \t\u0000 <x> "


def assert_same(first, second, texts):
    for name in ("vocab_size", "bos", "eos", "pad", "files"):
        assert getattr(first, name) == getattr(second, name), name
    assert [first.encode(text) for text in texts] == [second.encode(text) for text in texts]


def load_again(tokenizer, folder):
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return tokenization.load(folder)


def test_trained_tokenizer_spells_any_text(trained, texts):
    assert trained.vocab_size == 400
    assert (trained.pad, trained.eos, trained.bos) == (0, 2, None)
    for text in [*texts[:20], ODD]:
        ids = trained.encode(text)
        assert max(ids) < trained.vocab_size
        assert trained.decode(ids) == text


def test_training_repeats_itself(trained, texts):
    assert_same(tokenization.train(texts, 400, ("<pad>", "<sep>", "<eos>")), trained, texts[:20])


def test_special_tokens_are_left_out_of_a_text(trained):
    one, two = trained.encode("one"), trained.encode("two")
    assert trained.decode_batch([np.array([2, *one, 1, 2, 0]), two]) == ["one", "two"]
    assert trained.encode("<sep>") == [1]


def test_files_of_a_tokenizer_load_as_the_same(trained, texts, tmp_path):
    assert tokenization.is_in(tmp_path) is False
    again = load_again(trained, tmp_path / "again")
    assert tokenization.is_in(tmp_path / "again") is True
    assert_same(again, trained, [*texts[:20], ODD])


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 258, got 257"):
        tokenization.train(["a"], 257)


def test_stories_tokenizer_begins_with_1_and_ends_with_2(tmp_path):
    stories = tokenization.load(DATA / "stories260k")
    assert (stories.vocab_size, stories.bos, stories.eos) == (512, 1, 2)
    assert stories.pad == stories.eos  # it has none of its own
    ids = stories.encode("Once upon a time")
    assert ids == [403, 407, 261, 378]
    assert stories.decode([1, *ids, 2, 0, 2]) == "Once upon a time"
    again = load_again(stories, tmp_path / "again")
    assert_same(again, stories, [ODD])


@needs_shared
def test_gpt2_files_have_gpt2s_tokens(tmp_path):
    gpt2 = tokenization.load(SHARED / "tokenizers" / "gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.bos, gpt2.eos, gpt2.pad) == (50257, 50256, 50256, 50256)
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world"
    assert gpt2.decode(gpt2.encode(ODD)) == ODD
    assert_same(load_again(gpt2, tmp_path / "again"), gpt2, [ODD])


@needs_shared
def test_t5_file_has_t5s_tokens_and_sentinels(tmp_path):
    t5 = tokenization.load(SHARED / "tokenizers" / "t5")
    ids = t5.encode("translate English to German: The house is wonderful.")
    assert ids == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert (t5.vocab_size, t5.bos, t5.eos, t5.pad) == (32100, None, 1, 0)
    text = t5.decode([0, *ids, 32099, t5.eos, t5.pad])
    assert text == "translate English to German: The house is wonderful."
    assert_same(load_again(t5, tmp_path / "again"), t5, ["Das Haus ist wunderbar."])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<sep>", "pad_token": None}}, (None, 1, 1)),
        ({"special_tokens_map": {"eos_token": {"content": "<eos>"}}}, (None, 2, 2)),
        ({"generation_config": {"eos_token_id": [2, 1], "bos_token_id": 1}}, (1, 2, 2)),
        ({"config": {"eos_token_id": 2, "pad_token_id": -1}}, (None, 2, 2)),
        (
            {"tokenizer_config": {"eos_token": "<eos>"}, "config": {"eos_token_id": 1}},
            (None, 2, 2),
        ),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_special_tokens_are_looked_up_by_name_then_by_id(trained, tmp_path, settings, expected):
    (tmp_path / "tokenizer.json").write_bytes(trained.files["tokenizer.json"])
    for name, content in settings.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = tokenization.load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == expected
    again = load_again(tokenizer, tmp_path / "again")
    assert (again.bos, again.eos, again.pad) == expected


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path, monkeypatch):
    with pytest.raises(TokenizerError, match=f"^{tmp_path} has no tokenizer: no tokenizer.json"):
        tokenization.load(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(TokenizerError, match=f"^the tokenizer in {tmp_path} is not readable"):
            tokenization.load(tmp_path)
        (tmp_path / name).unlink()
    shutil.copy(DATA / "stories260k" / "tokenizer.model", tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="not installed: pip install sentencepiece"):
        tokenization.load(tmp_path)


# Metrics.


def test_rouge_of_a_summary_by_hand():
    # 4 of 5 words, stemmed, and 2 of 4 pairs of words are shared; so is "the cat sat" in order.
    scores = metrics.rouge(["the cats sat on mats"], [["on the cat sat a"]])
    assert scores == pytest.approx({"rouge1": 80, "rouge2": 50, "rougeL": 60})
    assert metrics.rouge(["a b"], [["A, b!"]]) == pytest.approx(
        {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    )


def test_reference_with_the_highest_rouge1_counts_for_all_scores():
    prediction, most_words, in_order = "a b c d", "d c b a", "a b c x y"
    alone = metrics.rouge([prediction], [[most_words]])
    assert metrics.rouge([prediction], [[in_order, most_words]]) == alone
    assert metrics.rouge([prediction], [[in_order]])["rougeL"] > alone["rougeL"]


def test_rouge_is_the_mean_over_summaries():
    scores = metrics.rouge(["a b", "c d"], [["a b"], ["x y"]])
    assert scores == pytest.approx({"rouge1": 50, "rouge2": 50, "rougeL": 50})


def test_bleu_is_sacrebleus_for_any_number_of_references():
    predictions = ["the cat sat on the mat", "it rains cats and dogs today"]
    first = ["the cat sat on a mat", "it rains dogs and cats"]
    expected = sacrebleu.corpus_bleu(predictions, [first]).score
    assert metrics.bleu(predictions, [[text] for text in first]) == expected
    better = metrics.bleu(predictions, [first[:1], [first[1], predictions[1]]])
    assert better > expected
    assert metrics.bleu(predictions, [[text] for text in predictions]) == pytest.approx(100)


def test_accuracy_is_the_share_of_right_labels():
    assert metrics.accuracy(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0])) == 75


@pytest.mark.parametrize(
    ("predictions", "references"), [([], []), (["a"], []), (["a"], ["a"]), (["a"], [[]])]
)
def test_texts_and_references_must_match(predictions, references):
    for metric in (metrics.rouge, metrics.bleu):
        with pytest.raises(ValueError, match="references"):
            metric(predictions, references)


def test_labels_and_predictions_must_match():
    with pytest.raises(ValueError, match=r"predictions \(2,\) for labels \(3,\)"):
        metrics.accuracy(np.zeros(2), np.zeros(3))

"""What FLORA's paper reports (Hao, Cao, Mou, ICML 2024, arXiv:2402.03293), and what to run for it.

A rank is a share of the width here, since the models that are trained in minutes are narrower.
Scores are not to be compared with the paper's, orders and gaps are.
"""

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal, NamedTuple


class Row(NamedTuple):
    method: Literal["none", "none-updates", "naive", "lora", "paper", "florax"]
    share: Fraction | None = None  # of the width, that the rank is
    score: float | None = None  # in the paper
    memory: float | None = None  # there, in GiB: what it takes more than `none`

    def variant(self, width: int, momentum: bool, unfactored: bool) -> str:
        """Its name, as `variants` has it."""
        rank = round((self.share or 0) * width)
        name = {
            "none": "none",
            "none-updates": "none-updates",
            "naive": "float32",
            "lora": "float32",
            "paper": f"{rank}-paper",
            "florax": f"{rank}-int8" if momentum else f"{rank}-both-int8",
        }[self.method]
        if momentum and self.method != "none":
            name = f"none+{name}"
        base = f"lora-{rank}" if self.method == "lora" else ""
        if unfactored:
            base = f"unfactored-{base}" if base else "unfactored"
        return f"{base}/{name}" if base else name


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
      title: what it is about.
      tasks: of `tasks`, each with what differs from its defaults.
      scores: per task the name of the score that is compared, or `LOSS`.
      models: shapes whose memory is compiled, with the arguments of `footprint`.
      rows: per model of the paper, what it reports; the first is what `tasks` are compared with.
      momentum: whether the buffer in question is the momentum, not the accumulator.
      unfactored: whether the base optimizer's second moments are of full size.
    """

    title: str
    tasks: dict[str, dict[str, Any]]
    scores: dict[str, str]
    models: dict[str, dict[str, Any]]
    rows: dict[str, list[Row]]
    momentum: bool = False
    unfactored: bool = False


SMALL = (Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(1, 2))  # r of a width of 512
GPT2 = tuple(Fraction(r, 768) for r in (8, 32, 128, 256, 384))  # the last is not the paper's
T5_3B = tuple(Fraction(r, 1024) for r in (16, 64, 256, 512))
GPT2_XL = tuple(Fraction(r, 1600) for r in (16, 64, 256, 512))


def _rows(
    none: float | None,
    naive: tuple[float | None, float],
    shares: tuple[Fraction, ...],
    lora: list[tuple[float | None, float | None]],
    flora: list[tuple[float | None, float | None]],
    momentum: bool = False,
) -> list[Row]:
    plain = [Row("none", None, none, 0.0), Row("naive", None, *naive)]
    if not momentum:
        plain.insert(1, Row("none-updates"))
    return [
        *plain,
        *(Row("lora", share, *own) for share, own in zip(shares, lora, strict=True)),
        *(Row("paper", share, *own) for share, own in zip(shares, flora, strict=True)),
        *(Row("florax", share) for share in shares),
    ]


LOSS = "test loss"  # in the place of a score: of so small a model ROUGE is noise
MANY = {"accumulate": 16}
KEPT = {"resample_every": 100}  # κ where it is not what is compared
NOTHING = (None, None)
T5_ROWS = {"source": 512, "length": 128}
GPT2_ROWS = {"length": 512}
DEEP = {"checkpoint": True}
PLAIN = {"checkpoint": False}

TABLES = {
    "1a": Table(
        "gradient accumulation, summarization",
        {"summarization": MANY, "t5": MANY},
        {"summarization": "rougeL", "t5": LOSS},
        {"t5-small": T5_ROWS | PLAIN, "t5-3b": T5_ROWS | DEEP},
        {
            "t5-small": _rows(
                26.4,
                (26.7, 0.12),
                SMALL,
                [(23.6, 0.07), (23.9, 0.11), (24.1, 0.19), (24.5, 0.32)],
                [(24.6, 0.00), (25.2, 0.00), (26.0, 0.02), (26.5, 0.04)],
            ),
            "t5-3b": _rows(
                34.6,
                (36.3, 9.9),
                T5_3B,
                [(34.0, 11.1), (34.1, 12.8), (34.4, 16.7), NOTHING],
                [(35.5, 0.3), (35.8, 1.5), (36.2, 2.8), (36.4, 5.4)],
            ),
        },
    ),
    "1b": Table(
        "gradient accumulation, translation",
        {"translation": MANY},
        {"translation": "BLEU"},
        {"gpt2": GPT2_ROWS | PLAIN, "gpt2-xl": GPT2_ROWS | DEEP},
        {
            "gpt2": _rows(
                17.9,
                (24.9, 0.47),
                GPT2,
                [(9.94, 0.48), (11.2, 0.52), (12.2, 0.60), (13.4, 0.75), NOTHING],
                [(16.3, 0.15), (22.0, 0.16), (24.0, 0.20), (25.4, 0.26), NOTHING],
            ),
            "gpt2-xl": _rows(
                28.2,
                (33.2, 5.78),
                GPT2_XL,
                [(17.4, 6.02), (19.5, 6.68), (20.7, 8.15), NOTHING],
                [(29.7, 0.34), (31.6, 0.52), (33.2, 1.17), (33.6, 2.04)],
            ),
        },
    ),
    "2a": Table(
        "momentum, summarization",
        {"t5": {"micro_batch": 8, "accumulate": 1, "updates": 1000, "at_once": 5}},
        {"t5": LOSS},
        {"t5-small": T5_ROWS | PLAIN | {"batch": 4}},
        {
            "t5-small": _rows(
                23.3,
                (23.8, 0.24),
                SMALL,
                [(14.9, 0.23), (16.7, 0.26), (17.4, 0.40), (17.9, 0.48)],
                [(20.4, 0.06), (21.5, 0.07), (23.2, 0.10), (24.0, 0.14)],
                momentum=True,
            )
        },
        momentum=True,
    ),
    "2b": Table(
        "momentum, translation",
        {"translation": {"micro_batch": 32, "accumulate": 1, "updates": 1500, "at_once": 5}},
        {"translation": "BLEU"},
        {"gpt2": GPT2_ROWS | PLAIN | {"batch": 4}},
        {
            "gpt2": _rows(
                19.4,
                (19.9, 0.50),
                GPT2,
                [(4.98, 0.47), (6.76, 0.51), (8.72, 0.60), (9.83, 0.81), NOTHING],
                [(9.14, 0.14), (14.9, 0.15), (18.6, 0.19), (19.9, 0.25), NOTHING],
                momentum=True,
            )
        },
        momentum=True,
    ),
    "4": Table(
        "gradient accumulation with second moments of full size",
        {"t5": MANY},
        {"t5": LOSS},
        {"t5-small": T5_ROWS | PLAIN},
        {
            "t5-small": _rows(
                26.1,
                (26.7, 0.13),
                SMALL,
                [(22.0, -0.17), (22.3, -0.13), (22.9, 0.01), (23.2, 0.21)],
                [(24.7, 0.01), (25.3, 0.01), (26.0, 0.01), (26.3, 0.05)],
            )
        },
        unfactored=True,
    ),
}


class Sweep(NamedTuple):
    """A task and what to compare on it."""

    task: str
    variants: tuple[str, ...]
    changes: Mapping[str, Any] = MappingProxyType({})  # to the task's defaults


class Footprint(NamedTuple):
    """A model whose steps are compiled, and by which variants."""

    model: str
    variants: tuple[str, ...]
    arguments: Mapping[str, Any]  # of `footprint`


# Where the data and the models of the tasks are, in two folders of the user's.
DATA = {
    "pretraining": ("lm_imdb", "lm_gutenberg"),
    "translation": ("multi30k", "tatoeba_deen"),
    "summarization": ("scitldr",),
    "denoising": ("lm_imdb", "lm_gutenberg"),
    "t5": ("scitldr", "xsum"),
    "vision": ("cifar100",),
}
TEST = {"translation": ("iwslt17_test",)}
MODELS = {"summarization": "smollm2", "t5": "t5"}
WIDTHS = {"pretraining": 256, "translation": 256, "summarization": 576, "t5": 256, "vision": 192}

MODEL_WIDTHS = {"t5-small": 512, "t5-3b": 1024, "gpt2": 768, "gpt2-xl": 1600}  # the paper's

KAPPAS = (1, 10, 100, 1000)  # of 2,000 updates; the paper's 1 to 10,000 are of more
KAPPA_RANK = 128  # half of the width, as in the paper


def sweeps(experiment: str) -> list[Sweep]:
    """What is trained for an experiment: a table of the paper, or a frontier."""
    if experiment in TABLES:
        table = TABLES[experiment]
        rows = next(iter(table.rows.values()))
        return [
            Sweep(
                task,
                tuple(row.variant(WIDTHS[task], table.momentum, table.unfactored) for row in rows),
                changes,
            )
            for task, changes in table.tasks.items()
        ]
    return OTHERS.get(experiment, [])


def footprints(experiment: str) -> list[Footprint]:
    """Whose memory is compiled for an experiment."""
    if experiment not in TABLES:
        return FOOTPRINTS.get(experiment, [])
    table = TABLES[experiment]
    found = []
    for model, rows in table.rows.items():
        names = (row.variant(MODEL_WIDTHS[model], table.momentum, table.unfactored) for row in rows)
        # An accumulator that is none is the same, whatever it is compared at.
        kept = tuple(name for name in names if not name.endswith("none-updates"))
        found.append(Footprint(model, kept, table.models[model]))
    return found


def _frontier(width: int) -> tuple[str, ...]:
    """Accumulator and optimizer state together, the most bytes first."""
    half, quarter, eighth, sixteenth = (width // n for n in (2, 4, 8, 16))
    return (
        "float32+float32",
        f"int8+{half}-int8",
        f"int4+{half}-int4",
        f"{half}-both-int8+{half}-int8",
        f"{half}-both-int4+{half}-int4",
        f"{quarter}-both-int4+{quarter}-int4",
        f"{eighth}-both-int4+{eighth}-int4",
        *(f"{r}-paper+{r}-paper" for r in (half, quarter, eighth)),
        f"lora-{quarter}/float32+float32",
        f"lora-{sixteenth}/float32+float32",
        "none",
        "none-updates",
        "adamw/float32",
        f"galore-{quarter}/float32",
        f"apollo-{quarter}/float32",
        "apollo-mini/float32",
        "bfloat16+float32",
    )


OTHERS = {
    "3": [
        Sweep("pretraining", ("none", "none+float32"), KEPT),
        *(
            Sweep(
                "pretraining",
                (f"none+{KAPPA_RANK}-paper", f"none+{KAPPA_RANK}-float32"),
                {"resample_every": kappa},
            )
            for kappa in KAPPAS
        ),
    ],
    "5": [
        Sweep(
            "vision",
            ("adamw/none", "none", "none+float32", "none+96-paper", "none+96-int8", "none+24-int8"),
        )
    ],
    "6": [
        Sweep(
            "pretraining",
            (
                "none+float32",
                "none",
                "adamw/none",
                "none+128-paper",
                "none+64-paper",
                "none+32-paper",
                "none+128-int8",
                "none+64-int8",
                "none+32-int8",
                "none+16-int4",
                "galore-128/none",
                "galore-64/none",
                "apollo-64/none",
                "apollo-mini/none",
                "lora-64/none+float32",
            ),
            KEPT,
        )
    ],
    "frontier": [
        Sweep(task, _frontier(WIDTHS[task]), MANY) for task in ("translation", "summarization")
    ],
}
_VIT = ("none", "adamw/none", "none+float32", "none+256-paper", "none+256-int8")
_C4 = {"batch": 16, "length": 256}
_SEVEN = {"dtype": "bfloat16", "batch": 16, "length": 256, "checkpoint": True}
_FIGURE_2 = (
    "adamw/none",
    "lora-64/none+float32",
    "none+float32",
    "none+256-paper",
    "none+256-int8",
)
_LAYERWISE = tuple(name for name in _FIGURE_2 if not name.startswith("lora"))
_FOUR = {"batch": 4, "source": 512, "length": 512}
FOOTPRINTS = {
    "5": [Footprint(model, _VIT, {"batch": 32} | PLAIN) for model in ("vit-base", "vit-large")],
    "6": [
        *(
            Footprint(
                model,
                (
                    "none", "adamw/none", "none+float32", f"galore-{rank}/none",
                    f"apollo-{rank}/none", "apollo-mini/none", f"none+{rank}-paper",
                    f"none+{rank}-int8",
                ),
                _C4 | PLAIN,
            )
            for model, rank in (("llama-60m", 128), ("llama-350m", 256))
        ),
        Footprint("llama-7b", ("none", "galore-1024/none", "none+256-paper"), _SEVEN),
        Footprint(
            "llama-7b",
            ("none", "none+256-paper", "none+1024-paper", "none+1024-int8"),
            _SEVEN | {"layerwise": True},
        ),
    ],
    "figure-2": [
        Footprint("t5-small", _FIGURE_2, _FOUR | PLAIN),
        Footprint("t5-small", _FIGURE_2, _FOUR | DEEP),
        Footprint("t5-small", _LAYERWISE, _FOUR | DEEP | {"layerwise": True}),
    ],
}  # fmt: skip
EXPERIMENTS = (*TABLES, *OTHERS, "figure-2")

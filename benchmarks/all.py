"""All rows of the tables, the most important first, each in a process of its own; then the tables.

    python benchmarks/all.py --limit 540

Rows that the results folder has are not measured again, so that what one call had no time for,
the next one does. Compiled programs are kept between the rows: speed.py runs what memory.py has
compiled.
"""

import dataclasses
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from florax_benchmarks import results, summary

XL32 = "--model gpt2-xl --dtype float32 --batch 1 --length 512"
XL16 = "--model gpt2-xl --dtype bfloat16 --batch 8 --length 512"
LLAMA = "--model llama-7b --dtype bfloat16 --batch 16 --length 256"
T5 = "--model t5-3b --dtype float32 --batch 1 --source 512 --length 128"
ROWS = (
    f"memory.py {XL32} --methods full sketched sketched-int8 whole-int8 whole-int4",
    f"speed.py {XL32} --methods full sketched sketched-int8 whole-int8 whole-int4",
    f"memory.py {LLAMA} --methods layerwise --run",
    f"memory.py {LLAMA} --methods layerwise-accumulate --run",
    f"memory.py {LLAMA} --methods layerwise layerwise-int8 --rank 1024 --run",
    f"memory.py {LLAMA} --methods sketched full --run",
    f"speed.py {LLAMA} --methods full sketched --rounds 2",
    f"memory.py {XL16} --methods full sketched",
    f"speed.py {XL16} --methods full sketched",
    f"memory.py {T5} --methods none sketched full",
    "momentum.py --model gpt2-xl",
    f"peers.py {XL32} --methods flora-opt full none",
    f"memory.py {XL32} --methods none dense multisteps",
    f"memory.py {XL16} --methods none",
    f"memory.py {LLAMA} --methods none --run",
    f"memory.py {XL32} --methods galore",
    f"peers.py {XL32} --methods galore",
    f"memory.py {XL32} --methods both both-int8",
    f"speed.py {XL32} --methods full both both-int8",
    f"finish.py {XL32}",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    limit: float = 540.0  # seconds for everything; what is running then is stopped
    only: str = ""  # run only rows with this text in their command
    results: Path = results.FOLDER  # folder for the JSON


def main(s: Settings) -> None:
    end = time.monotonic() + s.limit
    results.device()
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(),
        # Kernels that one method has tuned would make the next one's compilation look short.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    for row in filter(lambda row: s.only in row, ROWS):
        script, *flags = shlex.split(row)
        flags += ["--results", s.results.absolute()]
        command = [sys.executable, results.SCRIPTS / script, *flags]
        start = time.monotonic()
        print(f"\n$ python benchmarks/{row}", flush=True)
        if results.run(command, end - start) is None:
            print(f"stopped: the limit of {s.limit:.0f} seconds is reached")
            break
        print(f"{time.monotonic() - start:.0f} seconds", flush=True)
    print(f"\n{summary.table(s.results)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))

"""The tables of what was measured, as Markdown, from the JSON in the results folder.

    python benchmarks/report.py            # all tables
    python benchmarks/report.py --write    # puts those that the READMEs show into them, and draws

A table a benchmark and workload, with the command of its last row; at the end a summary of all.
"""

import dataclasses
from pathlib import Path
from typing import Any

from florax_benchmarks import pages, plots, results, summary, tables

VARIED = ("method", "methods", "variant", "seed")  # along the rows of a table


@dataclasses.dataclass(frozen=True)
class Settings:
    write: bool = False  # bring the READMEs up to date instead
    results: Path = results.FOLDER  # folder of the JSON


def main(s: Settings) -> None:
    if s.write:
        for page in pages.PAGES:
            path = results.REPOSITORY / page
            path.write_text(pages.fill(path.read_text(), s.results))
        plots.draw(s.results, results.SCRIPTS / "plots")
        return
    for benchmark, table in tables.OF.items():
        groups: dict[str, dict[str, dict[str, Any]]] = {}
        for row in results.read(s.results, benchmark):  # a newer row takes the place of an older
            names = {k: v for k, v in row["settings"].items() if k not in VARIED}
            title = ", ".join(
                [*(f"{k} {v}" for k, v in names.items()), row["conditions"]["device"]]
            )
            groups.setdefault(title, {})[str(row["settings"])] = row
        for title, rows in groups.items():
            *_, last = rows.values()
            print(f"### {benchmark}: {title}\n\n{table([*rows.values()])}\n")
            print(f"`{last['command']}`, {last['commit']}, {last['date'][:10]}\n")
    print(summary.table(s.results))


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))

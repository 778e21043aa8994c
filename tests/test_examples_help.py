"""What `--help` says of every script in `examples/` and `benchmarks/`, from any folder."""

import re
import runpy
import sys
from pathlib import Path

import extras
import pytest

extras.need("examples")

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = [
    path.relative_to(REPOSITORY)
    for folder in ("examples", "benchmarks")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_says_what_a_script_is_for_and_what_every_flag_is(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend((REPOSITORY / script).parent)  # as Python does
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"    python {script}" in text
    assert "type:" not in text

    # Behind the frame, which is of spaces where none can be printed.
    flags = re.split(r"\n[│ ] (?=--?\w)", text.partition(" options ")[2])[1:]
    assert any("--help" in flag for flag in flags)
    for flag in flags:
        explained = re.sub(r"\((default|required)\b.*|│", "", flag, flags=re.DOTALL)
        _, *words = re.split(r"  +|\n", explained)
        assert re.search(r"\w", "".join(words)), flag

"""pyproject.toml, the READMEs, the documentation and what CI runs agree on versions and names."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import florax

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CI = (REPOSITORY / ".ci/run").read_text()
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *(REPOSITORY / name / "README.md" for name in ("examples", "benchmarks")),
    *(path for path in (REPOSITORY / "docs").rglob("*.md") if "generated" not in path.parts),
]


def number(version):
    return tuple(map(int, version.split(".")))


def pythons():
    """The versions of Python that are claimed, oldest first."""
    claimed = (re.fullmatch(r".*Python :: (3\.\d+)", x) for x in PROJECT["project"]["classifiers"])
    return sorted((found[1] for found in claimed if found), key=number)


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == florax.__version__
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.*?)\]", changelog, re.M)[1]
    assert newest in ("Unreleased", florax.__version__)


def test_the_versions_of_python_that_are_claimed_are_those_that_ci_runs():
    assert sorted(re.findall(r"find_python (3\.\d+)", CI), key=number) == pythons()
    workflow = (REPOSITORY / ".github/workflows/tests.yml").read_text()
    assert set(re.findall(r"^ +(3\.\d+)$", workflow, re.M)) == set(pythons())


def test_the_lowest_python_is_the_one_that_all_pages_name():
    lowest = pythons()[0]
    assert PROJECT["project"]["requires-python"] == f">={lowest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest
    for page in ("README.md", "docs/start.md"):
        named = re.findall(r"Python (3\.\d+) or newer", (REPOSITORY / page).read_text())
        assert set(named) == {lowest}, page


def test_the_lower_bounds_are_the_versions_that_ci_runs_as_lowest():
    lowest = dict(re.findall(r"^(\w+)==(.*)$", (REPOSITORY / ".ci/lowest.txt").read_text(), re.M))
    claimed = dict(
        re.fullmatch(r"(\w+)>=(.*)", x).groups() for x in PROJECT["project"]["dependencies"]
    )
    for name, bound in claimed.items():
        width = len(number(bound))
        assert number(lowest[name])[:width] == number(bound), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_pages_install_what_there_is(page):
    """`pip install` of this project, with extras that it has."""
    text = page.read_text()
    extras = re.findall(r"pip install -e [\"']?\.\[([\w,]+)\]", text)
    assert {own for group in extras for own in group.split(",")} <= set(
        PROJECT["project"]["optional-dependencies"]
    )
    packages = re.findall(r"pip install (?!-)([\w-]+)", text)
    assert set(packages) <= {PROJECT["project"]["name"], "datasets"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_names_of_the_library_that_pages_use_exist(page):
    names = set(re.findall(r"(?<![\w./-])florax\.(\w+)", page.read_text()))
    assert {name for name in names if not hasattr(florax, name)} == set()


def test_what_ships_is_there():
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (REPOSITORY / name).exists(), name


def test_a_commit_is_checked_by_the_tools_of_ci():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.*)$", hooks, re.M)
    tools = {entry.split()[0] for entry in entries}
    wanted = {
        re.match(r"[\w-]+", own)[0] for own in PROJECT["project"]["optional-dependencies"]["dev"]
    }
    assert tools <= wanted
    assert tools == {"ruff", "mypy"}
    assert all(f'/{tool}"' in CI for tool in tools)
    assert set(re.findall(r"language: (.*)$", hooks, re.M)) == {"system"}


@pytest.mark.parametrize("left", ["", "set -m; sleep 60 & background=$!; set +m; "])
@pytest.mark.parametrize("steps, status", [("true", 0), ("false", 1), ("(exit 7)", 7)])
def test_ci_ends_with_the_status_of_its_steps_and_leaves_nothing(tmp_path, steps, status, left):
    before_the_steps = CI[: CI.index("# The path of a Python")]
    script = tmp_path / "ci" / "run"
    script.parent.mkdir()
    script.write_text(f'{before_the_steps}{left}echo "$background"; touch "$work/file"; {steps}\n')
    made = tmp_path / "made"
    made.mkdir()
    ended = subprocess.run(
        ["bash", script],
        env={**os.environ, "TMPDIR": str(made)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (ended.returncode, ended.stderr) == (status, "")
    assert not list(made.iterdir())
    if left:
        with pytest.raises(ProcessLookupError):
            os.killpg(int(ended.stdout), 0)


WITHOUT_THE_EXAMPLES = """
import importlib.metadata
import sys

import extras
import pytest

absent = {*extras.names("examples")} - {*extras.names("test")}
for module, distributions in importlib.metadata.packages_distributions().items():
    if absent.intersection(distributions):
        sys.modules[module] = None  # its import fails
distribution = importlib.metadata.distribution


def find(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)


importlib.metadata.distribution = find
sys.exit(pytest.main(["--collect-only", "-q", "-rs", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
def test_without_the_extra_of_the_examples_their_tests_are_skipped():
    collected = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXAMPLES],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "src:tests"},
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout[-2000:]
    assert 'needs flax: pip install -e ".[examples]"' in collected.stdout

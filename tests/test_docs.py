"""The documentation: every public name has its page and says what it must, links are checked."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import florax

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PUBLIC_NAMES = [name for name in dir(florax) if not name.startswith("_")]
FUNCTIONS = [name for name in PUBLIC_NAMES if inspect.isfunction(getattr(florax, name))]
CLASSES = [name for name in PUBLIC_NAMES if inspect.isclass(getattr(florax, name))]
NEVER_RAISE = {"attention_and_feed_forward"}
PAGES = [path for path in DOCS.rglob("*.md") if "generated" not in path.parts]


def sections(name):
    """By its heading, each part of a docstring; what stands before the first has none."""
    text = inspect.getdoc(getattr(florax, name))
    titles = r"^(Args|Attributes|Returns|Raises):\n|^(?=>>> )"
    parts = re.split(titles, text, flags=re.M)
    return {title or "": body for title, body in zip([None, *parts[1::2]], parts[::2], strict=True)}


def test_the_reference_has_a_page_for_every_public_name():
    """Sphinx makes it of the name's line in an autosummary."""
    index = (DOCS / "api/index.md").read_text()
    blocks = re.findall(r"\.\. autosummary::\n(.*?)```", index, re.S)
    names = [line.strip() for block in blocks for line in block.splitlines()]
    assert sorted(name for name in names if name.isidentifier()) == sorted(PUBLIC_NAMES)
    assert sorted(FUNCTIONS + CLASSES) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_a_docstring_is_a_line_then_details_and_an_example(name):
    text = inspect.getdoc(getattr(florax, name))
    first, *rest = text.split("\n")
    assert first.endswith(".") and rest[0] == ""
    assert re.search(r"^>>> .*florax", text, re.M)  # that it runs is another test: the doctest


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_every_argument_what_comes_back_and_what_is_raised(name):
    parts = sections(name)
    parameters = inspect.signature(getattr(florax, name)).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    own = [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]
    assert re.findall(r"^  (\**\w+): ", parts["Args"], re.M) == own
    assert parts["Returns"].strip()
    assert ("Raises" in parts) == (name not in NEVER_RAISE)


@pytest.mark.parametrize("name", CLASSES)
def test_the_docstring_of_a_class_names_its_fields(name):
    parts = sections(name)
    own = getattr(florax, name)
    fields = getattr(own, "_fields", None) or [*own.__dataclass_fields__]
    listed = parts.get("Attributes") or parts["Args"]
    assert re.findall(r"^  (\w+): ", listed, re.M) == list(fields)


def test_notebooks_are_without_outputs_and_pictures_are_small():
    assert not list(DOCS.rglob("*.ipynb"))
    kept = [p for p in DOCS.rglob("*") if p.is_file() and "generated" not in p.parts]
    assert [path.name for path in kept if path.stat().st_size > 200_000] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_that_is_not_run_when_the_site_is_built_is_a_doctest(page):
    """So that no example is only looked at."""
    for language, code in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.M | re.S):
        if language == "python":
            assert code.startswith(">>> ")
        else:
            assert language in ("sh", "diff") or language.startswith("{"), language


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.S):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            listed |= {(page.parent / f"{line}.md").resolve() for line in lines}
    assert {page.resolve() for page in PAGES} == listed | {DOCS / "index.md"}


# Links.


@pytest.fixture
def problems():
    spec = importlib.util.spec_from_file_location("check_links", DOCS / "check_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.problems


@pytest.mark.parametrize(
    "link, complaint",
    [
        ("other.html", None),
        ("other.html#there", None),
        ("#here", None),
        ("folder/inner.html", None),
        ("https://example.org/x#y", None),
        ("mailto:someone@example.org", None),
        ("missing.html", "not there"),
        ("other.html#missing", "without that anchor"),
        ("#missing", "without that anchor"),
    ],
)
def test_a_link_inside_the_site_has_to_lead_somewhere(problems, tmp_path, link, complaint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.html").write_text(f'<p id="here"><a href="{link}">x</a>')
    (tmp_path / "other.html").write_text('<a name="there"></a><a href="page.html#here">x</a>')
    (tmp_path / "folder/inner.html").write_text('<a href="../page.html">x</a>')
    found = problems(tmp_path)
    assert len(found) == (complaint is not None)
    assert all(complaint in sentence and link in sentence for sentence in found)


@pytest.mark.parametrize("tag", ["script src", "link href", "img src"])
def test_the_site_loads_nothing_from_other_hosts(problems, tmp_path, tag):
    (tmp_path / "own").touch()
    page = tmp_path / "page.html"
    page.write_text(f'<{tag}="own">')
    assert problems(tmp_path) == []
    page.write_text(f'<{tag}="https://cdn.example.org/x">')
    assert problems(tmp_path) == ["page.html loads https://cdn.example.org/x"]

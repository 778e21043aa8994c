"""Do the links inside the built site lead anywhere, and does it load nothing from other hosts?

python docs/check_links.py build/docs
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LOADED = {"audio", "embed", "iframe", "img", "link", "script", "source", "video"}


class Page(NamedTuple):
    anchors: set[str]  # what a link may name
    links: list[str]  # where a reader may go
    loaded: list[str]  # what a browser fetches by itself


def read(path: Path) -> Page:
    """The links of a page."""
    page = Page(set(), [], [])

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = {name: value for name, value in attributes if value is not None}
            page.anchors.update(given[name] for name in ("id", "name") if name in given)
            for name in ("href", "src"):
                if name in given:
                    (page.loaded if tag in LOADED else page.links).append(given[name])

    Reader().feed(path.read_text())
    return page


def problems(site: Path) -> list[str]:
    """What is wrong with a site, a sentence each."""
    pages = {path.resolve(): read(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in page.loaded:
            if urlsplit(link).netloc:
                found.append(f"{name} loads {link}")
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name} leads to {link}, which is not there")
                continue
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if parts.fragment and unquote(parts.fragment) not in anchors:
                found.append(f"{name} leads to {link}, a page without that anchor")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    found = problems(site)
    print(*found, f"{site}: {len(found)} bad links", sep="\n")
    sys.exit(bool(found) or not any(site.rglob("*.html")))

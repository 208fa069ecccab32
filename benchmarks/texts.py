"""Prepare the texts of the quality and healing benchmarks.

    apt-get download debian-handbook debian-reference-en developers-reference debian-policy
    apt-get download postgresql-doc-15 anarchism dict-jargon perl-doc
    for package in *.deb; do dpkg -x $package debian; done
    python benchmarks/texts.py debian texts

writes ``calibration.txt`` and ``handbook.txt`` (chapters of the Debian handbook, every fifth
held out), ``documentation.txt`` (Python's language reference, from the standard library), and
for healing, where the packages are there, ``manuals.txt`` (the other three manuals),
``code.txt`` (source code of the standard library), ``database.txt`` (PostgreSQL's manual) and
``essays.txt`` (prose: An Anarchist FAQ).
No step sees ``jargon.txt`` (prose: the Jargon File), to be scored on, and ``perl.txt`` (Perl's
documentation), to choose by. The handbook is by Raphaël Hertzog and Roland Mas, CC BY-SA 3.0 or
GPL 2+.
"""

import argparse
import gzip
import re
import sysconfig
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

from kvfold.files import write_text

HELD_OUT_EVERY = 5
MANUALS = (
    "usr/share/debian-reference/debian-reference.en.txt.gz",
    "usr/share/doc/debian-policy/policy.txt.gz",
    "usr/share/developers-reference/_sources/*.rst.txt",
)
ESSAYS = "usr/share/doc/anarchism/html/sec*.html"
DATABASE = "usr/share/doc/postgresql-doc-*/html/*.html"
JARGON = "usr/share/dictd/jargon.dict.dz"
PERL = "usr/share/perl/*/pod/*.pod"
CHARACTERS = 1_500_000  # at most, of what there is more of
_BLOCKS = {"p", "pre", "li", "h1", "h2", "h3", "h4", "dt", "dd", "td", "th", "div"}
_SKIPPED = {"head", "script", "style", "ul.docnav", "ol.docnav", "p#title", "div.toc"}
_NAVIGATION = {"Download the ebook", "Prev", "Next", "The Debian Administrator's Handbook"}
_VOID = {"img", "br", "hr", "link", "meta", "input", "col", "wbr", "area", "base"}


class _Prose(HTMLParser):
    """Collects the text of a page without its navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        values = dict(attrs)
        named = {tag, f"{tag}.{values.get('class')}", f"{tag}#{values.get('id')}"}
        if self._skipping or named & _SKIPPED:
            self._skipping.append(tag)
        if tag in _BLOCKS:
            self.parts.append("\n\n")
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass
        self._pre -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """The text of one page, paragraphs apart by one blank line."""
    parser = _Prose()
    parser.feed(html)
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", "".join(parser.parts)))
    return "\n\n".join(part for part in paragraphs if part and part not in _NAVIGATION)


def manuals(root: Path) -> list[str]:
    """The Debian manuals that are there, as plain text."""
    return [plain(path) for pattern in MANUALS for path in sorted(root.glob(pattern))]


def plain(path: Path) -> str:
    """A text file's content, compressed or not."""
    content = path.read_bytes()
    packed = path.suffix in (".gz", ".dz")
    return (gzip.decompress(content) if packed else content).decode(errors="replace")


def some(texts: Iterable[str]) -> str:
    """Those of the texts, every one whole, that CHARACTERS have room for."""
    chosen = ""
    for text in texts:
        if len(chosen) + len(text) <= CHARACTERS:
            chosen += text + "\n\n"
    return chosen


def spread(texts: list[str]) -> str:
    """Every so manieth of the texts, so that CHARACTERS are of all parts of them."""
    step = max(1, -(-sum(map(len, texts)) // CHARACTERS))
    return some(texts[::step])


def code() -> str:
    """Modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return some(path.read_text(encoding="utf-8") for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("packages", type=Path, help="the unpacked packages")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    root = arguments.packages

    def found(pattern: str) -> list[Path]:
        return sorted(root.glob(pattern))

    pages = found("usr/share/doc/debian-handbook/html/en-US/*.html")
    if not pages:
        parser.error(f"no handbook pages below {root}")
    texts = [page_text(page.read_text(encoding="utf-8")) for page in pages]
    arguments.out.mkdir(parents=True, exist_ok=True)
    held_out = texts[::HELD_OUT_EVERY]
    calibration = [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY]
    for name, parts in (
        ("handbook", held_out),
        ("calibration", calibration),
        ("documentation", [topics[name] for name in sorted(topics)]),
        ("manuals", manuals(root)),
        ("code", [code()]),
        ("database", [spread([page_text(plain(page)) for page in found(DATABASE)])]),
        ("essays", [spread([page_text(plain(page)) for page in found(ESSAYS)])]),
        ("jargon", [plain(path) for path in found(JARGON)]),
        ("perl", [spread([plain(page) for page in found(PERL)])]),
    ):
        write_text(arguments.out / f"{name}.txt", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

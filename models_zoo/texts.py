"""English texts for language models, from packages; nothing is fetched at run time.

* ``foldoc``: a dictionary of computing, Debian's ``dict-foldoc`` (Denis Howe, GFDL). Its first 70 % calibrate,
  the rest judges.
* ``wikipedia``: 206 pages that gensim's tests carry (CC BY-SA). Even pages calibrate, odd ones judge.
* ``docstrings``: of the running Python's standard library; calibration only.
* ``news``: gensim's ``lee_background.cor``; judges only, so it is a domain that nothing was calibrated on.
"""

from __future__ import annotations

import ast
import bz2
import functools
import gzip
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from lrcompile.zoo import lee
from lrcompile.zoo.base import MissingPackageError, cache_folder, package_folder

_FOLDOC = "usr/share/dictd/foldoc.dict.dz"
_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SPLIT = 0.7
"""Share of the dictionary that calibrates."""


@functools.cache
def _foldoc() -> str:
    """The whole dictionary; ``make zoo`` unpacks Debian's package into the cache where it is not installed."""
    for path in (Path("/", _FOLDOC), cache_folder() / "foldoc" / _FOLDOC):
        if path.is_file():
            return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    raise MissingPackageError("dict-foldoc")


@functools.cache
def _pages() -> tuple[str, ...]:
    """Plain text of the Wikipedia pages that hold any, in the order of the dump."""
    from gensim.corpora.wikicorpus import filter_wiki

    path = package_folder("gensim") / "test" / "test_data" / _WIKIPEDIA
    root = ElementTree.fromstring(bz2.decompress(path.read_bytes()))
    space = root.tag.partition("}")[0] + "}"
    found = (node.findtext(f"{space}revision/{space}text") or "" for node in root.iter(f"{space}page"))
    return tuple(filter_wiki(text).strip() for text in found if text[:9].upper() != "#REDIRECT")


def _docstrings() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        yield from (text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node)))


def _foldoc_part(first: bool) -> str:
    text = _foldoc()
    cut = text.index("\n", int(SPLIT * len(text)))
    return text[:cut] if first else text[cut:]


CALIBRATION: dict[str, Callable[[], str]] = {
    "foldoc": lambda: _foldoc_part(True),
    "wikipedia": lambda: "\n\n".join(_pages()[0::2]),
    "docstrings": lambda: "\n\n".join(_docstrings()),
}
EVALUATION: dict[str, Callable[[], str]] = {
    "foldoc": lambda: _foldoc_part(False),
    "wikipedia": lambda: "\n\n".join(_pages()[1::2]),
    "news": lambda: "\n\n".join(lee.calibration_documents()),
}

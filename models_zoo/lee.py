"""English texts with human similarity scores, from the test data that the package gensim carries.

* ``lee.cor``: 50 news texts; ``similarities0-1.txt``: human similarity of all 1,225 pairs (Lee, Pincombe, Welsh 2005).
* ``lee_background.cor``: 300 other news texts (7 of them occur twice), used for calibration only.
* ``wordsim353.tsv``: 353 word pairs with a human score (Finkelstein et al. 2002).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lrcompile.zoo.base import package_folder


def _text(name: str) -> str:
    # The news texts hold pound signs in Latin-1; the other files are plain ASCII.
    return Path(package_folder("gensim"), "test", "test_data", name).read_text(encoding="latin-1")


def _documents(name: str) -> list[str]:
    return [line.strip() for line in _text(name).split("\n") if line.strip()]


def calibration_documents() -> list[str]:
    """300 news texts that share no text with :func:`evaluation_documents`."""
    return _documents("lee_background.cor")


def evaluation_documents() -> list[str]:
    """The 50 news texts that people compared."""
    return _documents("lee.cor")


def document_similarities() -> np.ndarray:
    """Human similarity of the pairs i < j of the evaluation documents, in [0, 1], shape (1225,)."""
    table = np.array([[float(cell) for cell in row.split()] for row in _text("similarities0-1.txt").splitlines()])
    return table[np.triu_indices(len(table), k=1)]  # only the upper triangle is filled with means over people


def word_pairs() -> tuple[list[tuple[str, str]], np.ndarray]:
    """353 word pairs and their human scores in [0, 10], shape (353,)."""
    rows = [row.split("\t") for row in _text("wordsim353.tsv").splitlines() if row and not row.startswith("#")]
    return [(row[0], row[1]) for row in rows], np.array([float(row[2]) for row in rows])


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation of two vectors."""
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two vectors; ties get their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(a), rankdata(b))

"""The digits: how they are split, and the small file from which they are read again without scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from lrcompile.zoo.base import MissingPackageError

Part = Literal["calibration", "evaluation", "test"]
FILE = Path(__file__).with_name("digits.npz")
CALIBRATION = 256  # images of the training part that are shipped for calibration
SPLIT_SEED = 0
LEVELS = 16  # grey levels are 0..16


def digits(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Shipped images (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64 of one part.

    ``calibration`` is 256 images of the training part, ``evaluation`` the whole validation part, ``test`` the whole
    test part, kept for the accuracy alone (the README says how often it was counted).
    """
    if part not in get_args(Part):
        raise ValueError(f"unknown part '{part}', known: {', '.join(get_args(Part))}")
    with np.load(FILE) as file:
        return scaled(file[f"{part}_images"]), file[f"{part}_labels"].astype(np.int64)


def scaled(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 8, 8) grey levels 0..16 -> float32 (n, 1, 8, 8) in [0, 1], as the network takes them."""
    return (images[:, None] / LEVELS).astype(np.float32)


def source() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits of scikit-learn: images uint8 (n, 8, 8) and labels uint8 (n,).

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingPackageError("scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, dtype=np.uint8).reshape(-1, 8, 8), np.asarray(labels, dtype=np.uint8)


def split(labels: np.ndarray, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Disjoint shuffled indices: ``train`` 70 %, ``validation`` 10 % and ``test`` 20 % of every class."""
    random = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.array([0.2, 0.3]) * len(members)).astype(int)
        for name, chosen in zip(("test", "validation", "train"), np.split(members, cuts), strict=True):
            parts[name].append(chosen)
    return {name: random.permutation(np.concatenate(chosen)) for name, chosen in parts.items()}


def write(path: Path = FILE) -> None:
    """Write the shipped parts as uint8."""
    images, labels = source()
    indices = split(labels)
    chosen = {
        "calibration": indices["train"][:CALIBRATION],
        "evaluation": indices["validation"],
        "test": indices["test"],
    }
    arrays = {f"{part}_images": images[index] for part, index in chosen.items()}
    arrays |= {f"{part}_labels": labels[index] for part, index in chosen.items()}
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]

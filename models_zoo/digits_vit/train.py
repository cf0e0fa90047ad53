"""Train the digits ViT and write its files: ``python -m lrcompile.zoo.digits_vit.train``.

A fixed recipe: nothing is chosen while it runs, and the last moving average of the weights is what is shipped.
The recipe was chosen by images of the training and validation parts; the test part is only counted at the end.
Takes about two and a half minutes of one core. The same seed, versions and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrcompile.zoo.digits_vit import data
from lrcompile.zoo.digits_vit.network import Config, DigitsViT
from lrcompile.zoo.export import export_onnx

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters. Shifts are in pixels, rotation in degrees, zoom is relative; all are drawn uniformly."""

    seed: int = 0
    epochs: int = 200
    batch: int = 32
    rate: float = 1.5e-3
    warmup: float = 0.1
    decay: float = 0.1
    smoothing: float = 0.02
    average: float = 0.998
    shift: float = 1.0
    rotation: float = 10.0
    zoom: float = 0.12


def augmented(images: Tensor, recipe: Recipe) -> Tensor:
    """Shift, rotate and zoom each image (batch, 1, 8, 8) a little, with bilinear interpolation."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape) * 2 - 1

    count, size = len(images), images.shape[-1]
    angle, zoom = draw(count) * math.radians(recipe.rotation), 1 + draw(count) * recipe.zoom
    shift = draw(count, 2) * recipe.shift * 2 / size
    rows = [
        torch.stack([angle.cos() * zoom, -angle.sin() * zoom, shift[:, 0]], 1),
        torch.stack([angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, recipe: Recipe, config: Config | None = None) -> DigitsViT:
    """The moving average of the weights after all epochs, in eval mode."""
    torch.manual_seed(recipe.seed)
    model = DigitsViT(config)
    average = copy.deepcopy(model)
    fit(
        model,
        images,
        labels,
        recipe,
        lambda step: _follow(average, model, min(recipe.average, (step + 1) / (step + 11))),
    )
    return average.eval()


def fit(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, after: Callable[[int], None] | None = None
) -> None:
    """Trains a classifier of these images in place.

    Args:
        after: called with the number of each step when it is done.
    """
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=recipe.warmup)
    epochs = (torch.randperm(len(images)).split(recipe.batch) for _ in range(recipe.epochs))
    for step, chosen in enumerate(itertools.chain.from_iterable(epochs)):
        logits = model(augmented(images[chosen], recipe))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            after(step)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of right answers and mean cross-entropy."""
    logits = model(images)
    return (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def tensors(index: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images as the network takes them and labels, for indices into the source."""
    images, labels = data.source()
    return torch.from_numpy(data.scaled(images[index])), torch.from_numpy(labels[index].astype(np.int64))


def write(model: nn.Module, folder: Path) -> None:
    """Write ``model.safetensors`` and ``model.onnx``."""
    from safetensors.torch import save

    (folder / "model.safetensors").write_bytes(save(model.state_dict()))
    example = {"images": torch.zeros(2, 1, 8, 8)}
    export_onnx(model, example, folder / "model.onnx", outputs=("logits",), axes={"images": {0: "batch"}})


def command(text: str | None, folder: Path, make: Callable[[Tensor, Tensor], nn.Module]) -> Path:
    """Train, print the accuracies, write the model's files; returns their folder.

    Args:
        text: help of the command line.
        folder: where files go by default.
        make: trains on images and labels.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=folder, help="folder for the files")
    parser.add_argument("--threads", type=int, default=1, help="more brings little for arrays this small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    indices = data.split(data.source()[1])
    model = make(*tensors(indices["train"]))
    for part, index in indices.items():
        right, loss = accuracy(model, *tensors(index))
        print(f"{part:10} {len(index):4} images  accuracy {right:.4f}  cross-entropy {loss:.4f}")
    options.output.mkdir(parents=True, exist_ok=True)
    write(model, options.output)
    return options.output


def main() -> None:
    """Train the ViT and write its files, and the digits beside them."""
    folder = command(__doc__, FOLDER, lambda images, labels: train(images, labels, Recipe()))
    data.write(folder / "digits.npz")


if __name__ == "__main__":
    main()

"""Train the convolutional network and write its files: ``python -m lrcompile.zoo.digits_conv.train``.

Data, augmentation and schedule are the digits ViT's, with far fewer epochs, since normalised convolutions learn these
digits quickly. A fixed recipe: nothing is chosen while it runs, and the last weights are what is shipped. The same
seed, versions and number of threads give the same weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lrcompile.zoo.digits_conv.network import Config, DigitsConv
from lrcompile.zoo.digits_vit.train import Recipe, command, fit

FOLDER = Path(__file__).parent
RECIPE = Recipe(epochs=16, batch=32, rate=4e-3, warmup=0.2, decay=0.05)
"""Its moving average of the weights is not used: the statistics of the normalisations would not belong to it."""


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE, config: Config | None = None) -> DigitsConv:
    """The weights after all epochs, in eval mode."""
    torch.manual_seed(recipe.seed)
    model = DigitsConv(config)
    fit(model, images, labels, recipe)
    return model.eval()


def main() -> None:
    """Train, print the accuracies, write the files; in the ONNX file the normalisations are folded."""
    command(__doc__, FOLDER, train)


if __name__ == "__main__":
    main()

"""Train the convolutional network and write its files: ``python -m lrcompile.zoo.digits_conv.train``.

Data, augmentation and schedule are the digits ViT's, with far fewer epochs, since normalised convolutions learn these
digits quickly. A fixed recipe: nothing is chosen while it runs, and the last weights are what is shipped. The same
seed, versions and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lrcompile.zoo.digits_conv.network import Config, DigitsConv
from lrcompile.zoo.digits_vit import data
from lrcompile.zoo.digits_vit.train import Recipe, accuracy, augmented, tensors
from lrcompile.zoo.export import export_onnx

FOLDER = Path(__file__).parent
RECIPE = Recipe(epochs=16, batch=32, rate=4e-3, warmup=0.2, decay=0.05)
"""Its moving average of the weights is not used: the statistics of the normalisations would not belong to it."""


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE, config: Config | None = None) -> DigitsConv:
    """The weights after all epochs, in eval mode."""
    torch.manual_seed(recipe.seed)
    model = DigitsConv(config)
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=recipe.warmup)
    epochs = (torch.randperm(len(images)).split(recipe.batch) for _ in range(recipe.epochs))
    for chosen in itertools.chain.from_iterable(epochs):
        logits = model(augmented(images[chosen], recipe))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def write(model: DigitsConv, folder: Path = FOLDER) -> None:
    """Write ``model.safetensors`` and ``model.onnx``, in which the normalisations are folded."""
    from safetensors.torch import save

    (folder / "model.safetensors").write_bytes(save(model.state_dict()))
    example = {"images": torch.zeros(2, 1, 8, 8)}
    export_onnx(model, example, folder / "model.onnx", outputs=("logits",), axes={"images": {0: "batch"}})


def main() -> None:
    """Train, print the accuracies, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder for the files")
    parser.add_argument("--threads", type=int, default=1, help="more brings little for images this small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    indices = data.split(data.source()[1])
    model = train(*tensors(indices["train"]))
    for part, index in indices.items():
        right, loss = accuracy(model, *tensors(index))
        print(f"{part:10} {len(index):4} images  accuracy {right:.4f}  cross-entropy {loss:.4f}")
    options.output.mkdir(parents=True, exist_ok=True)
    write(model, options.output)


if __name__ == "__main__":
    main()

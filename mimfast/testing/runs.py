"""A run so small that a test can make many: coloured gradients as images, a network of a few thousand weights.

Or the embedded photographs as one batch, and the losses of a few steps on it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mimfast.data.decode import decode_image
from mimfast.data.sources import open_source
from mimfast.recipes import Data, Model, Optim, Recipe, Run, Score, Target, Train


def write_images(folder: Path, count: int = 12, classes: int = 0, side: int = 24) -> Path:
    """Write `count` PNG files of `side` px, in class folders when `classes` is not 0; classes differ in colour.
    Returns `folder`.
    """
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, side)
    for i in range(count):
        below = folder / f"class{i % classes}" if classes else folder
        below.mkdir(parents=True, exist_ok=True)
        colour = rng.uniform(0.2, 1, 3)
        if classes:
            colour = 0.3 * colour + 0.7 * np.eye(3)[i % classes % 3]
        picture = np.outer(ramp, rng.uniform(0.3, 1) + 0 * ramp)[..., None] * colour + 0.05 * rng.random(
            (side, side, 3)
        )
        Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(below / f"{i:03d}.png")
    return folder


def tiny_recipe(data: Path | str, out: Path | str, **train: int | float | str) -> Recipe:
    """A recipe of 6 steps of 4 images of 16 px on the CPU; keywords replace entries of its train section."""
    return Recipe(
        model=Model("mae", "vit", 16, 4, 16, 1, 2, decoder_dim=16, decoder_depth=1, decoder_heads=2),
        target=Target(norm=False),
        data=Data(path=str(data), holdout=0.25, recolour=0.5, workers=0),
        optim=Optim(batch_size=4, lr=3e-3, warmup=0.2),
        train=replace(Train(steps=6, log_every=1, checkpoint_steps=2, checkpoint_minutes=0.0, device="cpu"), **train),  # type: ignore[arg-type]
        score=Score(views=2),
        run=Run(name="tiny", out=str(out), tensorboard=False),
    )


def tiny_fastmim(data: Path | str, out: Path | str, **train: int | float | str) -> Recipe:
    """As `tiny_recipe`, with FastMIM over a ViT of 8 px patches on 32 px."""
    recipe = tiny_recipe(data, out, **train)
    model = Model("fastmim", "vit", 32, 8, 16, 1, 2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    return replace(recipe, model=model, target=Target())


def photographs(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: the first of the embedded photographs, squeezed to a square."""
    source = open_source("photos")
    images = [decode_image(source.read(i)).resize((side, side)) for i in range(count)]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def few_steps(method: nn.Module, img: Tensor, steps: int, lr: float = 1e-3) -> list[float]:
    """The losses of some steps of AdamW on one batch, with fresh masks."""
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr), []
    for _ in range(steps):
        loss = method(img)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

"""Does the encoder know something the labels can find? k-NN and a linear probe on frozen features.   N images, D
width, K classes
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimfast import recipes
from mimfast.data.loader import load_all
from mimfast.data.sources import Source, Subset
from mimfast.recipes import Recipe

# strengths of the L2 penalty that the linear probe chooses from, on a part of the training images
PENALTIES = (1e-4, 1e-3, 1e-2)
# raw pixels are averaged down to this side first
RAW_SIDE = 32


@dataclass(frozen=True)
class Probe:
    """Accuracies on held-out images.

    Attributes:
        rows: name of the features -> (k-NN accuracy, linear probe accuracy), both in [0, 1].
        neighbours: the k that was used.
        train: images the probes learnt from.
        test: held-out images.
        classes: number of classes.
    """

    rows: dict[str, tuple[float, float]]
    neighbours: int
    train: int
    test: int
    classes: int


def run(
    method: Any, train: Source, held_out: Source, recipe: Recipe, device: torch.device, workers: int = 0
) -> Probe | None:
    """Probe the trained encoder, the same encoder at its initial weights, and raw pixels; None without labels.

    Features are the mean of the patch tokens after the final norm, without the class token, of centre crops without a
    mask.
    """
    if not train.classes or train.classes != held_out.classes:
        return None
    size = recipe.model.img_size
    train_img, train_label = load_all(_some(train, recipe.score.probe_images), size, workers)
    test_img, test_label = load_all(_some(held_out, recipe.score.probe_images), size, workers)
    assert train_label is not None
    assert test_label is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        fresh: Any = recipes.build(recipe)
    untrained = fresh.encoder.to(device)
    kinds = {
        "trained encoder": lambda img: features(method.encoder, img, device),
        "same encoder, untrained": lambda img: features(untrained, img, device),
        "raw pixels": raw_pixels,
    }
    k = max(1, min(recipe.score.knn, len(train_label) // len(train.classes)))
    rows = {}
    for name, extract in kinds.items():
        a, b = extract(train_img), extract(test_img)
        rows[name] = (knn(a, train_label, b, test_label, k), linear(a, train_label, b, test_label, len(train.classes)))
    return Probe(rows, k, len(train_label), len(test_label), len(train.classes))


def _some(source: Source, most: int) -> Source:
    if len(source) <= most:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, most).round().astype(np.int64))


@torch.no_grad()
def features(encoder: Any, img: Tensor, device: torch.device, batch: int = 256) -> Tensor:
    """Mean patch token of each image.

    Args:
        encoder: gives (B, prefix + L, D) with class tokens first.
        img: (N, 3, H, W) uint8 on the CPU.
        device: where the encoder is.
        batch: images at a time.
    Returns:
        (N, D) fp32 on the CPU.
    """
    was_training, prefix = encoder.training, encoder.prefix
    encoder.eval()
    parts = [encoder(part.to(device))[:, prefix:].float().mean(1).cpu() for part in img.split(batch)]
    encoder.train(was_training)
    return torch.cat(parts)


def raw_pixels(img: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 as (N, 3 * side * side) fp32 in [0, 1], averaged down to at most 32 px."""
    side = min(RAW_SIDE, *img.shape[-2:])
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, side).flatten(1) for part in img.split(1024)])


def knn(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, k: int) -> float:
    """Accuracy of a vote of the k training images with the highest cosine similarity, after centring on their mean.

    Votes weigh exp(similarity / 0.07) (Wu et al., arXiv:1805.01978, section 3.4), which also breaks ties.
    """
    centre = train.mean(0)
    train_ND, test_ND = F.normalize(train - centre, dim=1), F.normalize(test - centre, dim=1)
    right = 0
    for part_ND, label in zip(test_ND.split(512), test_label.split(512)):
        similarity, neighbour = (part_ND @ train_ND.T).topk(k, dim=1)
        votes_NK = torch.zeros(len(part_ND), int(train_label.max()) + 1)
        votes_NK.scatter_add_(1, train_label[neighbour], ((similarity - 1) / 0.07).exp())
        right += int((votes_NK.argmax(1) == label).sum())
    return right / len(test)


def linear(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, classes: int) -> float:
    """Accuracy of a logistic regression on standardised features, L2 strength chosen on a fifth of the training set."""
    mean, std = train.mean(0), train.std(0, correction=0)
    # a feature that never changes would be divided by nothing
    scale = 1 / std.clamp_min(1e-6 * max(float(std.max()), 1e-30))
    train, test = (train - mean) * scale, (test - mean) * scale
    check = torch.arange(len(train)) % 5 == 4
    best = PENALTIES[len(PENALTIES) // 2]
    if int(check.sum()) >= classes:
        inner = [
            (_accuracy(_fit(train[~check], train_label[~check], classes, p), train[check], train_label[check]), p)
            for p in PENALTIES
        ]
        best = max(inner)[1]
    return _accuracy(_fit(train, train_label, classes, best), test, test_label)


def _fit(x_ND: Tensor, label: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight (K, D), bias (K,)) by full-batch L-BFGS from zero: the problem is convex and nothing is random."""
    weight_KD = torch.zeros(classes, x_ND.shape[1], requires_grad=True)
    bias_K = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_KD, bias_K], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x_ND @ weight_KD.T + bias_K, label) + 0.5 * penalty * weight_KD.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_KD.detach(), bias_K.detach()


def _accuracy(head: tuple[Tensor, Tensor], x_ND: Tensor, label: Tensor) -> float:
    weight_KD, bias_K = head
    return float(((x_ND @ weight_KD.T + bias_K).argmax(1) == label).float().mean())

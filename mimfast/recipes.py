"""Recipes: what `mimfast pretrain NAME` runs, as plain data.

A recipe is one frozen `Recipe` made of small sections. Each function below returns one; its docstring gives the
command, the hardware, the time to expect and, where the numbers come from a publication, the source and the published
scores. Nothing here touches an image or a device; `build` makes the network.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mimfast._check import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Model:
    """The network."""

    method: Literal["mae"] = "mae"
    """Pre-training method."""
    encoder: str = "vit_b16"
    """Encoder by name: vit_ti16, vit_s16, vit_b16, vit_l16, vit_h14, vit_micro4 and more, or vit with free sizes."""
    img_size: int = 224
    """Side of the training crop in pixels; a multiple of patch."""
    patch: int | None = None
    """Side of a patch in pixels; none: what the encoder's name says."""
    dim: int | None = None
    """Encoder width; none: what the encoder's name says."""
    depth: int | None = None
    """Encoder blocks; none: what the encoder's name says."""
    heads: int | None = None
    """Encoder attention heads; none: what the encoder's name says."""
    decoder_dim: int = 512
    """Decoder width."""
    decoder_depth: int = 8
    """Decoder blocks."""
    decoder_heads: int = 16
    """Decoder attention heads."""


@dataclass(frozen=True)
class Masking:
    """What is hidden from the encoder."""

    ratio: float = 0.75
    """Hidden fraction of the patches, 0 <= ratio < 1."""


@dataclass(frozen=True)
class Target:
    """What is predicted."""

    norm: bool = True
    """Standardise each target patch by its own mean and variance (better features, predictions no longer plain
    pixels).
    """
    kind: Literal["mse", "l1", "smooth_l1"] = "mse"
    """Distance between prediction and target."""


@dataclass(frozen=True)
class Data:
    """Images in, batches out."""

    path: str = "photos"
    """Folder of images (any tree), or "photos" or "digits" for the embedded ones."""
    eval: str | None = None
    """Separate folder for the final table; none: a held-out part of path."""
    holdout: float = 0.05
    """Fraction of path that is never trained on, 0 < holdout < 1."""
    labels: bool = True
    """Probe the encoder at the end when the class sub-folders give labels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a fraction of the image, smallest and largest."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop, narrowest and widest."""
    flip: bool = True
    """Mirror half of the crops."""
    recolour: float = 0.0
    """Strength of random colour changes, 0 to 1, for sets of few images; 0: none."""
    workers: int | None = None
    """Loader threads; none: by the hardware; 0: load between the steps. The batches are the same for any number."""


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and half-cosine decay."""

    batch_size: int = 4096
    """Images per step, over all devices."""
    lr: float | None = None
    """Peak learning rate; none: base_lr * batch_size / 256."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images, used when lr is none."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup: float = 0.05
    """Fraction of the run spent on linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = 0.05
    """Decay of every parameter except biases and other one-dimensional ones."""
    clip: float | None = None
    """Largest gradient norm; none: not clipped."""


@dataclass(frozen=True)
class Train:
    """Length, logging, checkpoints, hardware."""

    steps: int | None = None
    """Length of the run in steps; none: epochs decides."""
    epochs: float | None = None
    """Length of the run in passes over the training images, used when steps is none."""
    seed: int = 0
    """Decides initial weights, sample order, crops and masks."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU that has it, fp32 on CPU."""
    compile: bool = False
    """Run the method through torch.compile."""
    log_every: int = 20
    """Steps between log lines."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints; 0: by time only."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, beside checkpoint_steps; 0: by steps only."""
    keep: int = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True)
class Score:
    """The final table."""

    images: int = 256
    """Most held-out images used for the reconstruction error."""
    views: int = 16
    """Crops, each with its own mask, of every held-out image."""
    knn: int = 20
    """Neighbours of the k-NN probe."""
    probe_images: int = 10000
    """Most training images the probes learn from."""


@dataclass(frozen=True)
class Run:
    """Where results go."""

    name: str = "mae"
    """Name of the run, shown in the report; set by the recipe."""
    out: str | None = None
    """Run folder; none: the first free runs/NAME-N."""
    tensorboard: bool = True
    """Also write TensorBoard events when the package is installed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: Model = field(default_factory=Model)
    mask: Masking = field(default_factory=Masking)
    target: Target = field(default_factory=Target)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    score: Score = field(default_factory=Score)
    run: Run = field(default_factory=Run)


def mae_photos() -> Recipe:
    """MAE on the dozen photographs that scikit-image and scikit-learn ship.

    Command: `mimfast pretrain`. Hardware: two CPU cores, two to three minutes. A small ViT on 64 px crops with 8 px
    patches that predicts plain pixels, so that its error can be compared with simple fills in pixel space. Nine
    photographs hold few colours, hence `recolour`: without it the network learns them by heart, and its error on new
    ones is 0.0311 instead of 0.0255 (seed 0). The run shows that everything works; it makes no useful encoder.
    """
    return Recipe(
        model=Model("mae", "vit", 64, 8, 96, 4, 3, decoder_dim=64, decoder_depth=2, decoder_heads=2),
        target=Target(norm=False),
        data=Data(path="photos", holdout=0.25, crop_scale=(0.1, 1.0), recolour=0.5),
        optim=Optim(batch_size=16, lr=3e-3, warmup=0.02),
        train=Train(steps=2000, log_every=20, checkpoint_steps=1000),
        score=Score(views=64),
        run=Run(name="mae_photos"),
    )


def mae_digits() -> Recipe:
    """MAE on scikit-learn's 1797 labelled 8x8 digits, drawn at 32 px.

    Command: `mimfast pretrain --data digits`. Hardware: two CPU cores, three minutes. The labels give a k-NN and
    a linear probe.
    """
    return Recipe(
        model=Model("mae", "vit", 32, 4, 128, 4, 4, decoder_dim=64, decoder_depth=2, decoder_heads=4),
        target=Target(norm=False),
        data=Data(path="digits", holdout=0.2, crop_scale=(0.6, 1.0), flip=False),
        optim=Optim(batch_size=64, lr=1e-3),
        train=Train(steps=700, log_every=20, checkpoint_steps=500),
        score=Score(views=2),
        run=Run(name="mae_digits"),
    )


def mae_small() -> Recipe:
    """A first look at a folder of one's own: a small MAE on 64 px crops that predicts plain pixels.

    Command: `mimfast pretrain --data DIR`. Hardware: two CPU cores, about ten minutes, or any GPU.
    """
    return Recipe(
        model=Model("mae", "vit_micro8", 64, decoder_dim=96, decoder_depth=2, decoder_heads=4),
        target=Target(norm=False),
        data=Data(holdout=0.1),
        optim=Optim(batch_size=64, lr=1e-3),
        train=Train(steps=2000),
        score=Score(views=4),
        run=Run(name="mae_small"),
    )


def mae_cifar() -> Recipe:
    """MAE for 32 px images in class folders, such as CIFAR-10 written as JPEG files.

    Command: `mimfast pretrain mae_cifar --data DIR/train --data.eval DIR/test`. Hardware: two CPU cores, about ten
    minutes. Normalised pixels, as features and not pictures are wanted; a shallow, narrow decoder leaves the time to
    the encoder.
    """
    return Recipe(
        model=Model("mae", "vit", 32, 4, 128, 6, 4, decoder_dim=64, decoder_depth=1, decoder_heads=2),
        data=Data(path="cifar10/train", holdout=0.1),
        optim=Optim(batch_size=64, lr=2e-3),
        train=Train(steps=2000, log_every=50),
        score=Score(views=1),
        run=Run(name="mae_cifar"),
    )


def _imagenet(name: str, encoder: str) -> Recipe:
    # the released weights come from 1600 epochs, of which 40 warm up; warmup is a fraction of the run
    return Recipe(
        model=Model("mae", encoder),
        data=Data(path="imagenet/train", holdout=0.001),
        train=Train(epochs=1600, log_every=50, checkpoint_steps=5000),
        optim=Optim(batch_size=4096, base_lr=1.5e-4, warmup=40 / 1600),
        run=Run(name=name),
    )


def mae_vit_b() -> Recipe:
    """MAE ViT-B/16 on ImageNet-1k, the official recipe (arXiv:2111.06377 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain mae_vit_b --data imagenet/train`. Hardware: 8 GPUs of 80
        GB.
    Published: batch 4096, 1600 epochs, AdamW (0.9, 0.95), base lr 1.5e-4, decay 0.05, warm-up 40 epochs, crops 0.2-1,
        ratio
    0.75, normalised pixels; fine-tuned 83.66 %, linear probe 67.8 %; about 2070 GPU hours on V100 in the authors' code.
    """
    return _imagenet("mae_vit_b", "vit_b16")


def mae_vit_l() -> Recipe:
    """MAE ViT-L/16 on ImageNet-1k, the official recipe (arXiv:2111.06377 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain mae_vit_l --data imagenet/train`. Hardware: 8 GPUs of 80
        GB.
    Published: as mae_vit_b; fine-tuned 85.95 %, linear probe 76.0 %; 800 epochs take about 42 h on 64 V100.
    """
    return _imagenet("mae_vit_l", "vit_l16")


def mae_vit_h() -> Recipe:
    """MAE ViT-H/14 on ImageNet-1k, the official recipe (arXiv:2111.06377 and the authors' repository).

    Command: `torchrun --nnodes 4 --nproc-per-node 8 -m mimfast pretrain mae_vit_h --data imagenet/train`. Hardware:
        32 GPUs of 80 GB.
    Published: as mae_vit_b with 14 px patches; fine-tuned 86.93 % at 224 px, linear probe 77.2 %.
    """
    return _imagenet("mae_vit_h", "vit_h14")


RECIPES = (mae_photos, mae_digits, mae_small, mae_cifar, mae_vit_b, mae_vit_l, mae_vit_h)


def by_name(name: str) -> Recipe:
    """The recipe called `name`, with hyphens or underscores. Raises UserError that lists the recipes."""
    from mimfast.settings import did_you_mean

    known = {make.__name__: make for make in RECIPES}
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise UserError(
            f"pretrain: recipe has {name!r}, expected one of {', '.join(known)} because those are the functions of "
            f"mimfast.recipes{did_you_mean(wanted, known)}"
        )
    return known[wanted]()


def default_for(path: str | None) -> Recipe:
    """The recipe of a run that names none, by its data: "photos" or nothing, "digits", or a folder."""
    return {"photos": mae_photos, None: mae_photos, "digits": mae_digits}.get(path, mae_small)()


def describe(recipe: Recipe) -> str:
    """The network in a few words."""
    model = recipe.model
    sizes = {"wide": model.dim, "blocks": model.depth, "heads": model.heads}
    own = [f"{value} {word}" for word, value in sizes.items() if value is not None]
    own += [f"{model.patch} px patches"] if model.patch is not None else []
    name = "ViT" if model.encoder == "vit" else model.encoder
    return f"{model.method.upper()}, {name}" + (f" ({', '.join(own)})" if own else "")


def peak_lr(recipe: Recipe) -> float:
    """The peak learning rate: lr, or base_lr * batch_size / 256 (the linear rule of MAE)."""
    optim = recipe.optim
    return optim.lr if optim.lr is not None else optim.base_lr * optim.batch_size / 256


def build(recipe: Recipe) -> "nn.Module":
    """The method of a recipe with fresh weights drawn from torch's generator (call torch.manual_seed before)."""
    from mimfast.methods.mae import MAE

    model = recipe.model
    return MAE.build(
        model.encoder,
        model.img_size,
        model.patch,
        ratio=recipe.mask.ratio,
        norm=recipe.target.norm,
        kind=recipe.target.kind,
        decoder_dim=model.decoder_dim,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
    )


def as_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as {section: {key: value}}."""
    return dataclasses.asdict(recipe)

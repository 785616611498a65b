"""Recipes of MAE."""

from mimfast.recipes.sections import Data, Model, Optim, Recipe, Run, Score, Target, Train


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

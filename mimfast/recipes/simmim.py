"""Recipes of SimMIM."""

from dataclasses import replace

from mimfast.recipes.sections import Data, Masking, Model, Optim, Recipe, Run, Score, Target, Train

# raw pixels, absolute differences
_RAW = Target(norm=False, kind="l1")


def simmim_tiny() -> Recipe:
    """SimMIM with a small Swin on the dozen photographs that scikit-image and scikit-learn ship.

    Command: `mimfast pretrain simmim_tiny`. Hardware: two CPU cores, a few minutes.
    """
    return Recipe(
        model=Model("simmim", "swin_nano", 128),
        mask=Masking(0.6, block=32),
        target=_RAW,
        data=Data(path="photos", holdout=0.25, crop_scale=(0.1, 1.0), recolour=0.5),
        optim=Optim(batch_size=16, lr=2e-3, warmup=0.05, betas=(0.9, 0.999), clip=5.0),
        train=Train(steps=1000, log_every=20, checkpoint_steps=1000),
        score=Score(views=64),
        run=Run(name="simmim_tiny"),
    )


def _imagenet(name: str, model: Model) -> Recipe:
    # the authors scale every rate by batch / 512: 1e-4 becomes 4e-4 at 2048, the 5e-7 of the warm-up 2e-6
    return Recipe(
        model=model,
        mask=Masking(0.6, block=32),
        target=_RAW,
        data=Data(path="imagenet/train", holdout=0.001, crop_scale=(0.67, 1.0), resample="bilinear"),
        optim=Optim(
            batch_size=2048,
            base_lr=0.5e-4,
            warmup=10 / 800,
            warmup_lr=2e-6,
            schedule="multistep",
            milestones=(700 / 800,),
            betas=(0.9, 0.999),
            clip=5.0,
        ),
        train=Train(epochs=800, log_every=50, checkpoint_steps=5000),
        run=Run(name=name),
    )


def simmim_vit_b() -> Recipe:
    """SimMIM ViT-B/16 on ImageNet-1k at 224 px (arXiv:2111.09886 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain simmim_vit_b --data imagenet/train`. Hardware: 8 GPUs of
    80 GB.
    Published: batch 2048, 800 epochs, AdamW (0.9, 0.999), base lr 1e-4 per 512 images (4e-4), decay 0.05, warm-up 10
    epochs from 2e-6, a tenth from epoch 700 on, clip 5, drop path 0.1, crops 0.67-1 (bilinear), blocks of 32 px, ratio
    0.6, raw pixels, L1; BEiT's ViT with shared relative positions; fine-tuned 83.8 %. The FastMIM paper's figure says
    3307 GPU hours, presumably V100.
    """
    return _imagenet("simmim_vit_b", Model("simmim", "beit_b16", 224, drop_path=0.1))


def simmim_swin_b() -> Recipe:
    """SimMIM Swin-B on ImageNet-1k at 192 px (arXiv:2111.09886 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain simmim_swin_b --data imagenet/train`. Hardware: 8 GPUs of
    80 GB.
    Published: as simmim_vit_b with windows of 6 and no drop path; fine-tuned at 224 px 84.0 % after 800 epochs.
    """
    return _imagenet("simmim_swin_b", Model("simmim", "swin_b", 192))


def simmim_swinv2_b() -> Recipe:
    """SimMIM SwinV2-B on ImageNet-1k at 192 px (arXiv:2111.09883, arXiv:2206.04664 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain simmim_swinv2_b --data imagenet/train`. Hardware: 8 GPUs
    of 80 GB.
    Published: as simmim_vit_b with windows of 12 and pixels standardised by a window of 47 px around each; fine-tuned
    85.0 % after 500 000 steps, which are 800 epochs.
    """
    recipe = _imagenet("simmim_swinv2_b", Model("simmim", "swinv2_b", 192, window=12, drop_path=0.1))
    return replace(recipe, target=replace(_RAW, what="local"))

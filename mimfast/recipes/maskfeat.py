"""Recipes of MaskFeat."""

from mimfast.recipes.sections import Data, Masking, Model, Optim, Recipe, Run, Train


def maskfeat_vit_b() -> Recipe:
    """MaskFeat ViT-B/16 on ImageNet-1k at 224 px (arXiv:2112.09133 and the SlowFast repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain maskfeat_vit_b --data imagenet/train`. Hardware: 8 GPUs
    of 80 GB.
    Published: lr 1.6e-3 at batch 2048, AdamW (0.9, 0.999), decay 0.05, warm-up 30 epochs from 1e-6, cosine to 1e-6,
    clip 0.02, crops 0.5-1, BEiT's rectangles over at most 40 % of the patches, normalised HOG, no decoder; 300 epochs
    in the repository's file, 1600 for the released weights, fine-tuned 84.0 % then. `--train.epochs 300
    --optim.warmup 0.1` is the short run. The authors train in fp32 (`--train.precision fp32`).
    """
    return Recipe(
        model=Model("maskfeat", "vit_b16", 224),
        mask=Masking(0.4),
        data=Data(path="imagenet/train", holdout=0.001, crop_scale=(0.5, 1.0)),
        optim=Optim(
            batch_size=2048,
            base_lr=2e-4,
            min_lr=1e-6,
            warmup=30 / 1600,
            warmup_lr=1e-6,
            betas=(0.9, 0.999),
            clip=0.02,
        ),
        train=Train(epochs=1600, log_every=50, checkpoint_steps=5000),
        run=Run(name="maskfeat_vit_b"),
    )

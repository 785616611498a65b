"""Recipes of MixMIM (MixMAE)."""

from mimfast.recipes.sections import Data, Masking, Model, Optim, Recipe, Run, Score, Target, Train


def mixmim_tiny() -> Recipe:
    """MixMIM with a small Swin on the dozen photographs that scikit-image and scikit-learn ship.

    Command: `mimfast pretrain mixmim_tiny`. Hardware: two CPU cores, about three to four minutes. Three stages on 64 px
    crops, 16 tokens of 16 px at the end, half of them of another photograph; plain pixels, so that the error can be
    compared with simple fills in pixel space.
    """
    return Recipe(
        model=Model("mixmim", "mixswin_nano", 64, decoder_dim=64, decoder_depth=2, decoder_heads=2),
        mask=Masking(0.5),
        target=Target(norm=False),
        data=Data(path="photos", holdout=0.25, crop_scale=(0.1, 1.0), recolour=0.5),
        optim=Optim(batch_size=16, lr=2e-3, warmup=0.05),
        train=Train(steps=1500, log_every=20, checkpoint_steps=1000),
        score=Score(views=64),
        run=Run(name="mixmim_tiny"),
    )


def mixmim_b() -> Recipe:
    """MixMIM-B on ImageNet-1k at 224 px (arXiv:2205.13137 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain mixmim_b --data imagenet/train`. Hardware: 8 GPUs of
    80 GB. The authors use 16 of 128 images each; as all images of a process share one mask, fewer processes mean fewer
    different masks in a step.
    Published: batch 2048, 600 epochs, AdamW (0.9, 0.95), base lr 1.5e-4 per 256, decay 0.05 (of mask token and bias
    tables too), warm-up 40 epochs, crops 0.2-1, units of 32 px, ratio 0.5, normalised pixels, decoder of 8 blocks of
    512, fp16; fine-tuned 85.1 %. Their repository gives no GPU hours.
    """
    return Recipe(
        model=Model("mixmim", "mixswin_b", 224),
        mask=Masking(0.5),
        data=Data(path="imagenet/train", holdout=0.001),
        optim=Optim(batch_size=2048, base_lr=1.5e-4, warmup=40 / 600),
        train=Train(epochs=600, log_every=50, checkpoint_steps=5000),
        run=Run(name="mixmim_b"),
    )

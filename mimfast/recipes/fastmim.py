"""Recipes of FastMIM and FastMIM-P."""

from dataclasses import replace

from mimfast.recipes.sections import Data, Masking, Model, Optim, Progress, Recipe, Run, Score, Train


def fastmim_tiny() -> Recipe:
    """FastMIM on the dozen photographs that scikit-image and scikit-learn ship: edges instead of pixels.

    Command: `mimfast pretrain fastmim_tiny`. Hardware: two CPU cores, about two minutes. A small ViT on 64 px crops
    whose 8 px patches are one histogram cell each. The report draws target and prediction as stars of edges, and
    compares the error with the mean histogram, the nearest visible one, and zero. Nine photographs teach little about
    the edges of others: the model stays a few per cent below the mean histogram. The run shows that everything works;
    it makes no useful encoder.
    """
    return Recipe(
        model=Model("fastmim", "vit", 64, 8, 96, 4, 3, decoder_dim=64, decoder_depth=1),
        mask=Masking(block=8),
        data=Data(path="photos", holdout=0.25, crop_scale=(0.02, 0.5), recolour=0.5),
        optim=Optim(batch_size=16, lr=3e-3, warmup=0.05),
        train=Train(steps=2500, log_every=20, checkpoint_steps=1000),
        score=Score(views=64),
        run=Run(name="fastmim_tiny"),
    )


def _imagenet(name: str, model: Model, epochs: int, batch: int, warmup: int, block: int) -> Recipe:
    # the authors count warm-up in epochs, here it is a fraction of the run
    return Recipe(
        model=model,
        mask=Masking(block=block),
        data=Data(path="imagenet/train", holdout=0.001),
        optim=Optim(batch_size=batch, base_lr=1.5e-4, warmup=warmup / epochs),
        train=Train(epochs=epochs, log_every=50, checkpoint_steps=5000),
        run=Run(name=name),
    )


def fastmim_vit_b() -> Recipe:
    """FastMIM ViT-B/16 on ImageNet-1k at 128 px (arXiv:2212.06593 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain fastmim_vit_b --data imagenet/train`. Hardware: 8 GPUs of
    80 GB.
    Published: batch 4096, 800 epochs, AdamW (0.9, 0.95), base lr 1.5e-4 per 256, decay 0.05, warm-up 20 epochs, crops
    0.2-1, blocks of 16 px, ratio 0.75, normalised HOG, decoder of 1 block of 256; fine-tuned at 224 px 83.8 %. The
    authors' figure says 608 GPU hours and 70 GB, against 2069 h and 203 GB of MAE and 3307 h and 242 GB of SimMIM; it
    does not name the GPU, presumably V100, nor the epochs of the others.

    The authors pre-train with 6 attention heads of 128 channels and fine-tune with 12 of 64: an encoder that is to be
    fine-tuned must be loaded with the number that its user wants, the weights do not tell.
    """
    return _imagenet("fastmim_vit_b", Model("fastmim", "vit_b16", 128, heads=6), 800, 4096, 20, 16)


def fastmim_swin_b() -> Recipe:
    """FastMIM Swin-B on ImageNet-1k at 128 px (arXiv:2212.06593 and the authors' repository).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain fastmim_swin_b --data imagenet/train`. Hardware: 8 GPUs
    of 80 GB.
    Published: batch 2048, 400 epochs, AdamW (0.9, 0.95), base lr 1.5e-4 per 256, decay 0.05, warm-up 10 epochs, crops
    0.2-1, windows of 4, blocks of 32 px, ratio 0.75, normalised HOG, decoder of 4 blocks of 256; fine-tuned at 224 px
    84.1 %. The authors give no GPU hours for it.
    """
    return _imagenet("fastmim_swin_b", Model("fastmim", "swin_b", 128), 400, 2048, 10, 32)


def fastmim_pvtv2_b2() -> Recipe:
    """FastMIM PVTv2-B2 on ImageNet-1k at 128 px, as an example of a backbone of timm (arXiv:2212.06593).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain fastmim_pvtv2_b2 --data imagenet/train`. Hardware: 8 GPUs
    of 80 GB. Needs `pip install mimfast[timm]`; any other name works as `--model.encoder timm:NAME`.
    Published: 82.5 % after 800 epochs, with a pixel target by the name of the released file (`--target.what pixels`).
    Its other settings are not published: batch, rate, warm-up and decoder here are those of Swin-B, an estimate.
    """
    return _imagenet("fastmim_pvtv2_b2", Model("fastmim", "timm:pvt_v2_b2", 128), 800, 2048, 20, 32)


def fastmim_p_vit_b() -> Recipe:
    """FastMIM-P ViT-B/16 on ImageNet-1k: fastmim_vit_b with images that grow from 128 to 224 px (arXiv:2212.06593).

    Command: `torchrun --nproc-per-node 8 -m mimfast pretrain fastmim_p_vit_b --data imagenet/train`. Hardware: 8 GPUs
    of 80 GB.
    Published: the idea, and four lists in the authors' code (size, batch, accumulation, first epoch); neither their
    values nor a score of their own could be found, and the released models do not follow the lists. The schedule here
    is an estimate: four stages of equal epochs at 128, 160, 192 and 224 px, the batch falling roughly with the number
    of tokens, and the peak learning rate with it; all else as in fastmim_vit_b. It has 2.0 times the tokens of
    fastmim_vit_b and 0.64 times those of a run at 224 px.

    Any fastmim run can have a schedule of its own: `--progress.sizes 128 192 --progress.batch-sizes 4096 2048
    --progress.starts 0 0.5 --model.img-size 192`.
    """
    recipe = _imagenet("fastmim_p_vit_b", Model("fastmim", "vit_b16", 224, heads=6), 800, 4096, 20, 16)
    return replace(recipe, progress=Progress((128, 160, 192, 224), (4096, 3072, 2048, 1536), (0.0, 0.25, 0.5, 0.75)))

"""The sections of a recipe: plain frozen data, each field with its meaning below it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Model:
    """The network."""

    method: Literal["mae", "fastmim", "simmim", "maskfeat", "mixmim", "greenmim"] = "mae"
    """Pre-training method."""
    encoder: str = "vit_b16"
    """Encoder by name: vit_ti16, vit_s16, vit_b16, vit_l16, vit_h14, vit_micro4 and more, or vit with free sizes;
    beit_b16, swin_b, mixswin_b (mixmim) and their kin; "timm:NAME" for a backbone of timm (fastmim).
    """
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
    window: int | None = None
    """Side of the attention window in tokens (swin and swinv2); none: shorter side of the crop / 32."""
    decoder_dim: int | None = None
    """Decoder width; none: the method's own, 512 for mae, mixmim and greenmim, 256 for fastmim."""
    decoder_depth: int | None = None
    """Decoder blocks; none: the method's own, 8 for mae and mixmim, 1 for greenmim, 1 (ViT) or 4 for
    fastmim."""
    decoder_heads: int | None = None
    """Decoder attention heads; none: the method's own, 16 for mae, heads of 32 channels for others."""
    drop_path: float = 0.0
    """Highest rate of dropped residual branches, rising linearly with depth; 0 <= drop_path < 1."""
    drop_last: int = 0
    """Last encoder blocks that are left out of pre-training (fastmim)."""


@dataclass(frozen=True)
class Masking:
    """What is hidden from the encoder."""

    ratio: float = 0.75
    """Hidden fraction of the patches, 0 <= ratio < 1."""
    block: int | None = None
    """Side of a mask block in pixels (fastmim, simmim); none: the method's own."""


@dataclass(frozen=True)
class Target:
    """What is predicted."""

    norm: bool = True
    """Standardise each target patch by its own mean and variance (better features, predictions no longer plain
    pixels). For HOG: scale the histogram of each cell and colour to length 1.
    """
    kind: Literal["mse", "l1", "smooth_l1"] = "mse"
    """Distance between prediction and target."""
    what: Literal["pixels", "hog", "local"] | None = None
    """pixels, histograms of oriented gradients, or pixels standardised by a window around each; none: the method's
    own: hog for fastmim and maskfeat, pixels for mae and simmim.
    """
    gaussian_window: int = 0
    """Side in pixels of the Gaussian windows that weigh a HOG target; 0: none."""


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
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter that brings the crops to their size."""
    recolour: float = 0.0
    """Strength of random colour changes, 0 to 1, for sets of few images; 0: none."""
    decoder: Literal["auto", "pillow", "torchcodec", "nvimagecodec", "dali", "dali_gpu"] = "auto"
    """What decodes image files; auto: what measures fastest here. Stores of pixels need none. dali_gpu decodes
    and crops on the GPU, with nearly the same pixels.
    """
    repeat: int = 1
    """Views of each image in a batch, each with a crop and a mask of its own; the image is read and decoded once for
    them, and an epoch has as many samples as ever, so fewer images.
    """
    cache: Literal["none", "host", "gpu"] = "none"
    """Keep decoded images in the memory of the machine or of each GPU from the first epoch on. The batches stay the
    same. A run whose images do not fit says so at once.
    """
    cache_side: int | None = None
    """Take crops out of copies of the images that are squeezed to squares of this side in pixels, so that a cache takes
    3 * cache_side**2 bytes an image; none: out of the images.
    """
    workers: int | None = None
    """Loader threads; none: one for each core, on a CPU as few as keep up with the steps; 0: load between the steps.
    The batches are the same for any number.
    """


@dataclass(frozen=True)
class Progress:
    """A resolution schedule (FastMIM-P); off without sizes."""

    sizes: tuple[int, ...] = ()
    """Side of the training crop in pixels, stage after stage; the last one is model.img_size."""
    batch_sizes: tuple[int, ...] = ()
    """Images per step of each stage, over all devices; empty: optim.batch_size throughout. The peak learning rate
    follows when optim.lr is none.
    """
    starts: tuple[float, ...] = ()
    """Where each stage begins, as a share of the images of the run, from 0 up; empty: stages of equal length."""


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up, then half a cosine or steps."""

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
    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """After the warm-up: half a cosine down to min_lr, or a tenth at every milestone."""
    milestones: tuple[float, ...] = ()
    """Fractions of the run at which the multistep rate falls to a tenth, ascending."""


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
    progress: Progress = field(default_factory=Progress)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    score: Score = field(default_factory=Score)
    run: Run = field(default_factory=Run)

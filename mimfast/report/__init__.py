"""The end of a run: encoder file, final table, pictures and the page that holds them."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mimfast import __version__, layouts, probe
from mimfast._check import UserError
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD
from mimfast._weights import write_atomically
from mimfast.data.cpu import default_workers
from mimfast.data.sources import Source
from mimfast.encoders import MixSwin
from mimfast.probe import Probe
from mimfast.recipes import Recipe
from mimfast.report import curve, gradients, losses, page, reconstruct, sheet
from mimfast.report.gradients import Gradients
from mimfast.report.losses import Losses
from mimfast.report.reconstruct import LINEAR, MEAN, MODEL, NEAREST, Reconstruction, psnr
from mimfast.targets import HOG, Pixels
from mimfast.train.metrics import read
from mimfast.train.screen import Screen, clock


@dataclass(frozen=True)
class Facts:
    """What the report says about a run besides its results."""

    recipe: Recipe
    folder: Path
    steps: int
    seconds: float
    train_images: int
    held_out_images: int
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """One table as text; the first row is the model's."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def versions() -> dict[str, str]:
    """What made the results: packages, Python, system, GPU."""
    found = {"mimfast": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "pillow", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def conclude(facts: Facts, method: Any, train: Source, held_out: Source, device: torch.device, screen: Screen) -> None:
    """Measure the trained method, write encoder.safetensors, pictures, results.json and report.html, print tables.

    Raises:
        UserError: the results cannot be written.
    """
    out, recipe = facts.folder, facts.recipe
    try:
        mixed = isinstance(method.encoder, MixSwin)  # timm has no such encoder
        layouts.export(method.encoder if mixed else method, out / "encoder.safetensors", "mixmim" if mixed else "timm")
        method.eval()
        screen.say("measuring on held-out images")
        workers = default_workers() if recipe.data.workers is None else recipe.data.workers
        found = _predictions(method, train, held_out, recipe, device, workers)
        probed = probe.run(method, train, held_out, recipe, device, workers) if recipe.data.labels else None
        method.train()
        tables = [found.table] if found is not None else []
        tables += [_probe_table(probed)] if probed is not None else []
        _write_results(out, found, probed)
        lines = read(out / "metrics.jsonl")
        points = [(line["step"], line["loss"]) for line in lines]
        picture = found.picture if found is not None else None
        if found is not None and picture is not None:
            write_atomically(out / f"{found.name}.png", lambda path: picture.save(path, "PNG"))
        graph = curve.draw(points, f"{recipe.run.name}: training loss")
        write_atomically(out / "loss.png", lambda path: graph.save(path, "PNG"))
        text = page.render(facts, tables, picture, curve.svg(points), lines, versions())
        write_atomically(out / "report.html", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"pretrain: run.out has {str(out)!r}, expected a folder that takes the results because "
            f"{error.strerror or error}; the checkpoint is "
            f"safe, --resume writes the results again"
        ) from error
    for table in tables:
        screen.table(table.title, table.head, table.rows, table.notes)
    if facts.bad:
        screen.warn(
            f"{len(facts.bad)} images could not be read and were replaced, such as {facts.bad[0][0]!r} "
            f"({facts.bad[0][1]})"
        )
    screen.say(f"\n{page.who_waited(lines) or 'data: no step was logged'}")
    screen.say(f"{facts.steps} steps in {clock(facts.seconds)}; everything is in {out}, open {out / 'report.html'}")


@dataclass(frozen=True)
class _Found:
    """What was predicted on held-out images: a name for the files, what results.json says, table and picture."""

    name: str
    result: dict[str, Any]
    table: Table
    picture: Image.Image | None


def _predictions(
    method: Any, train: Source, held_out: Source, recipe: Recipe, device: torch.device, workers: int
) -> _Found | None:
    """Measure the predictions in the way of the method's target; None when nothing is hidden."""
    if recipe.mask.ratio == 0:
        return None
    if isinstance(method.target, HOG):
        hog = gradients.score(method, train, held_out, recipe, device, workers)
        picture = sheet.draw_hog(*hog.shown, _paint(method))
        return _Found("hog", _numbers(hog), _hog_table(hog, recipe), picture)
    if isinstance(method.target, Pixels):
        pixels = reconstruct.score(method, held_out, recipe, device, workers)
        table = _reconstruction_table(pixels, recipe)
        return _Found("reconstruction", _numbers(pixels), table, sheet.draw(*pixels.shown))
    loss = losses.score(method, held_out, recipe, device, workers)
    return _Found("loss", _numbers(loss), _loss_table(loss, recipe), None)


def _numbers(result: Reconstruction | Gradients | Losses) -> dict[str, Any]:
    return {key: value for key, value in vars(result).items() if key != "shown"}


def _paint(method: Any) -> tuple[int, int, int] | None:
    """The colour of hidden blocks in 0..255 where the method has one of its own."""
    token = getattr(method, "mask_token", None)
    if token is None or token.shape != (1, 3, 1, 1):
        return None
    colour = token.detach().float().cpu().flatten() * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    red, green, blue = (colour.clamp(0, 1) * 255).round().int().tolist()
    return red, green, blue


def _hog_table(result: Gradients, recipe: Recipe) -> Table:
    names = (gradients.MODEL, gradients.MEAN, gradients.PLACE, gradients.NEAREST, gradients.ZERO)
    model = result.mse[gradients.MODEL]
    rows = [[name, f"{result.mse[name]:.5f}", f"{model / result.mse[name]:.3f}"] for name in names]
    worse = [name for name in names[1:] if not model < result.mse[name]]
    notes = [
        "The model beats every guess." if not worse else f"The model does not beat: {', '.join(worse)}.",
        f"Held-out images: {result.images}, each in {result.views} crops with masks of its own, "
        f"{result.images * result.views} in all; histograms of the hidden cells, {100 * recipe.mask.ratio:g} % hidden.",
    ]
    return Table("HOG of held-out images", ["guess of the hidden blocks", "MSE", "model / guess"], rows, notes)


def _loss_table(result: Losses, recipe: Recipe) -> Table:
    rows = [[name, f"{value:.5f}"] for name, value in result.loss.items()]
    notes = [
        f"The target's own loss over hidden patches of {result.images} held-out images in {result.views} crops each, "
        f"{100 * recipe.mask.ratio:g} % hidden. Its values cannot be drawn as pixels: the statistics they lack are "
        "those of hidden pixels too."
    ]
    return Table("Loss on held-out images", ["guess of the hidden patches", "loss"], rows, notes)


def _reconstruction_table(result: Reconstruction, recipe: Recipe) -> Table:
    head = ["fill of the hidden patches", "MSE", "PSNR"]
    rows = [
        [name, f"{result.mse[name]:.5f}", f"{psnr(result.mse[name]):.2f} dB"] for name in (MODEL, MEAN, NEAREST, LINEAR)
    ]
    rows[-1][0] += " (for information)"
    beaten = [name for name in (MEAN, NEAREST) if result.mse[MODEL] < result.mse[name]]
    verdict = {
        2: "The model beats both baselines.",
        1: f"The model beats one of two baselines: {''.join(beaten)}.",
        0: "The model beats no baseline yet.",
    }
    notes = [
        verdict[len(beaten)],
        f"Held-out images: {result.images}, each in {result.views} crops with masks of its own, "
        f"{result.images * result.views} in all; pixels in "
        f"[0, 1], hidden patches only, {100 * recipe.mask.ratio:g} % hidden.",
    ]
    if recipe.target.norm:
        notes.append(
            "The model predicts standardised patches; the mean and deviation of hidden ones are interpolated from "
            "visible ones, so its error "
            "here says less than for a plain pixel target."
        )
    return Table("Reconstruction of held-out images", head, rows, notes)


def _probe_table(probed: Probe) -> Table:
    rows = [[name, f"{100 * near:.1f} %", f"{100 * lin:.1f} %"] for name, (near, lin) in probed.rows.items()]
    notes = [
        f"{probed.classes} classes; learnt from {probed.train} training images, tested on {probed.test} held-out "
        "ones. Features: mean patch "
        f"token. k-NN: k = {probed.neighbours}, cosine. Linear: logistic regression."
    ]
    return Table("What labels find in the features", ["features", "k-NN", "linear probe"], rows, notes)


def _write_results(out: Path, found: _Found | None, probed: Probe | None) -> None:
    results: dict[str, Any] = {}
    if found is not None:
        results[found.name] = found.result
    if probed is not None:
        results["probe"] = asdict(probed)
    write_atomically(
        out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    )

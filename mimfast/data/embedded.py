"""The two image sets of the demo extra, written once into the cache as real files and then read like any folder.

- photos: the colour photographs inside the scikit-image and scikit-learn packages (nothing is downloaded).
- digits: scikit-learn's 1,797 labelled 8x8 digits, one folder per class.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mimfast._check import UserError
from mimfast.data.index import cache_root
from mimfast.data.sources import Folder

_SCIKIT_IMAGE = [
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
]
_PHOTOS = {"skimage": ("data", _SCIKIT_IMAGE), "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"])}
# Two everyday photographs. Never one of the motorcycle pair: its sibling in training shows the same scene.
_HELD_OUT = ("chelsea.png", "coffee.png")
_NEEDED = len(_HELD_OUT) + 1
_VERSION = 1


def photos() -> Folder:
    """Whole colour photographs, 300 to 1411 pixels on a side; `split` holds out chelsea.png (a cat) and coffee.png.

    Raises UserError when the demo extra is not installed.
    """
    files = [path for package in _PHOTOS for path in _bundled(package)]
    if len(files) < _NEEDED:
        raise UserError(
            f"data: 'photos' found {len(files)} photographs in the installed scikit-image and scikit-learn, "
            f"expected at least {_NEEDED} because two are held out: pip install --upgrade 'mimfast[demo]'"
        )

    def write(folder: Path) -> None:
        for path in files:
            shutil.copyfile(path, folder / path.name)

    stamp = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return Folder(_write_once("photos", stamp, write), held_out=_HELD_OUT)


def digits() -> Folder:
    """8x8 grayscale PNG files in ten class folders. Raises UserError when scikit-learn is not installed."""
    _package_folder("sklearn")
    return Folder(_write_once("digits", "", _write_digits))


def _write_digits(folder: Path) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 in the package
    for label in range(10):
        (folder / str(label)).mkdir()
    for i, (image, label) in enumerate(zip(pixels, data.target)):
        Image.fromarray(image).save(folder / str(label) / f"{i:04d}.png")


def _package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(
            f"data: the embedded images need the package {name}, which is not installed; they need the demo extra: "
            "pip install 'mimfast[demo]'"
        )
    return Path(spec.submodule_search_locations[0])


def _bundled(package: str) -> list[Path]:
    """The photographs present in the installed version; what a version does not ship is not fetched."""
    below, names = _PHOTOS[package]
    folder = _package_folder(package) / below
    return [folder / name for name in names if (folder / name).is_file()]


def _write_once(name: str, stamp: str, write: Callable[[Path], None]) -> Path:
    """Fill <cache>/<name>/<version>-<hash of stamp> once.

    The files go into a temporary folder that is renamed when complete, so that a killed or a concurrent run never
    leaves a half-written set under the final name.
    """
    parent = cache_root() / name
    final = parent / f"v{_VERSION}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
    if final.is_dir():
        return final
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, final)
    except OSError as error:
        if not final.is_dir():  # otherwise another process was first, and its copy is as good
            raise UserError(
                f"data: the {name} could not be written to '{parent}' ({error}), expected a writable cache"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final

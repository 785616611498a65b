import numpy as np
import pytest

from mimfast._check import UserError
from mimfast.data import embedded
from mimfast.data.decode import decode
from mimfast.data.sources import open_source, split


@pytest.fixture
def demo():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")


@pytest.mark.usefixtures("demo")
def test_photos_are_real_colour_files():
    source = open_source("photos")
    assert len(source) >= 8
    assert source.classes is None
    for i in range(len(source)):
        pixels = decode(source.read(i)).astype(int)
        assert min(pixels.shape[:2]) >= 300
        assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 1, f"{source.name(i)} is gray"


@pytest.mark.usefixtures("demo")
def test_held_out_photos():
    for holdout in (0.1, 5):
        train, held = split(open_source("photos"), holdout)
        assert [held.name(i) for i in range(len(held))] == ["chelsea.png", "coffee.png"]
        assert not {"chelsea.png", "coffee.png"} & {train.name(i) for i in range(len(train))}


@pytest.mark.usefixtures("demo")
def test_digits():
    source = open_source("digits")
    assert len(source) == 1797
    assert source.classes == [str(i) for i in range(10)]
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    for i in (0, 500, 1796):
        name = source.name(i)
        number = int(name.split("/")[1].removesuffix(".png"))
        assert source.label(i) == sklearn.target[number]
        np.testing.assert_allclose(decode(source.read(i))[..., 0], sklearn.images[number] * 255 / 16, atol=0.51)


@pytest.mark.usefixtures("demo")
def test_written_once(monkeypatch):
    first = open_source("photos").path
    monkeypatch.setattr(embedded.shutil, "copyfile", lambda *_: pytest.fail("written again"))
    assert open_source("photos").path == first


@pytest.mark.usefixtures("demo")
def test_interrupted_writing_leaves_nothing(cache, monkeypatch):
    copy, calls = embedded.shutil.copyfile, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(source, target)

    monkeypatch.setattr(embedded.shutil, "copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source("photos")
    assert list((cache / "photos").iterdir()) == []
    assert len(open_source("photos")) >= 8


@pytest.mark.usefixtures("demo")
def test_another_process_was_first(monkeypatch):
    rename = embedded.os.rename
    finals = []

    def late(source, target):
        if not finals:
            finals.append(target)
            open_source("photos")  # the other process, from start to end
        rename(source, target)

    monkeypatch.setattr(embedded.os, "rename", late)
    source = open_source("photos")
    assert [source.path] == finals
    assert [path.name for path in source.path.parent.iterdir()] == [source.path.name]


@pytest.mark.parametrize("name", ["photos", "digits"])
def test_without_the_demo_extra(monkeypatch, name):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed; they need the demo extra: pip install 'mimfast\[demo\]'"):
        open_source(name)


def test_version_of_the_packages_with_too_few_photographs(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_package_folder", lambda _: tmp_path)
    with pytest.raises(UserError, match="'photos' found 0 photographs"):
        open_source("photos")

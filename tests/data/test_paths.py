import pytest

from mimfast._check import UserError
from mimfast.data.paths import braces, files_of, kind_of
from mimfast.testing.images import encode, picture

PNG = encode(picture(8, 8), "PNG")


def test_braces():
    assert braces("plain") == ["plain"]
    assert braces("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    for pattern, message in (
        ("{5..1}.tar", "range 5..1"),
        ("{0..999999}.tar", "range"),
        ("{0..999}{0..999}.tar", "1000000 files"),
    ):
        with pytest.raises(UserError, match=message):
            braces(pattern)


def test_a_folder_with_both_archives_and_images_is_a_folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    assert kind_of(str(tmp_path)) == "tar"
    (tmp_path / "train").mkdir()
    assert kind_of(str(tmp_path)) == "folder"
    (tmp_path / "train").rmdir()
    (tmp_path / "1.png").write_bytes(PNG)
    assert kind_of(str(tmp_path)) == "folder"


def test_only_the_training_split_of_a_folder(tmp_path):
    for name in ("train-1.tar", "val-0.tar", "train-0.tar", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"")
    assert files_of(str(tmp_path)) == [str(tmp_path / "train-0.tar"), str(tmp_path / "train-1.tar")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", r"folder '.*nowhere' does not exist, expected a folder of images, tar shards, a store"),
        ("nowhere.tar", r"'.*nowhere\.tar' does not exist"),
        ("no-*.tar", r"'.*no-\*\.tar' does not exist"),
        ("a.tar.gz", r"a\.tar\.gz' is no folder .* a compressed tar cannot be read at random: unpack it"),
        ("a.zip", r"a\.zip' is no folder .* unpack it"),
        ("a.h5", r"a\.h5' is no folder .* write tar shards from it"),
        ("a.txt", r"a\.txt' is a file, expected the folder that holds the images"),
    ],
)
def test_refused(tmp_path, path, message):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=f"^data: .*{message}"):
        kind_of(f"{tmp_path}/{path}")


@pytest.mark.parametrize("path", ["https://host/a.tar", "s3://bucket/{0..9}.tar", "pipe:cat a.tar", "hf://datasets/x"])
def test_nothing_is_downloaded(path):
    with pytest.raises(UserError, match="is an address, expected a path because nothing is downloaded"):
        kind_of(path)

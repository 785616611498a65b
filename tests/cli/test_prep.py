"""`mimfast prep`, `mimfast prep verify`, and training from what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mimfast
from mimfast import cli
from mimfast.data import store_writer
from mimfast.data.store import Store
from mimfast.testing.images import write_folder
from mimfast.testing.runs import tiny_recipe, write_images


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMFAST_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", 12, 2)
    return tmp_path


def test_prep_verify_and_a_second_time(capsys):
    assert cli.main(["prep", "images", "out", "--size", "16", "--format", "raw", "--square"]) == 0
    assert "prep: 'out' has 12 images (0.0 MB, 0.8 kB each); 12 read in" in capsys.readouterr().out
    assert Store("out").pixels(3).shape == (16, 16, 3)
    assert Store("out").meta["source"] == "images"
    assert cli.main(["prep", "verify", "out"]) == 0
    assert capsys.readouterr().out == "verify: 0 problems: 12 records are as they were written\n"
    assert cli.main(["prep", "images", "out", "--size", "16", "--format", "raw", "--square"]) == 0
    assert "prep: 'out' was there already, with 12 images" in capsys.readouterr().out
    assert cli.main(["prep", "images", "out", "--size", "17"]) == 2
    assert "prep: 'out' is a store already, of something else" in capsys.readouterr().err


def test_verify_names_damage(capsys, here):
    cli.main(["prep", "images", "out", "--format", "raw"])
    with open("out/data.mim", "r+b") as file:
        file.seek(64 + 5)
        file.write(b"\xff")
        file.truncate(os.path.getsize("out/data.mim") - 2000)
    capsys.readouterr()
    assert cli.main(["prep", "verify", "out"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("damaged: data.mim has ")
    assert lines[1].startswith("damaged: record 0 (bytes 64 to 1791 of data.mim) has CRC-32C")
    assert lines[1].endswith(": 'class0/000.png'")
    assert "is cut off after" in lines[2]
    assert lines[-1].startswith("verify: 4 problems") or lines[-1].startswith("verify: 3 problems")
    os.truncate(here / "out" / "data.mim", 64)
    assert cli.main(["prep", "verify", "out"]) == 2


def test_bad_images_are_told(capsys, here):
    good, bad = write_folder(here / "odd")
    assert cli.main(["prep", "odd", "out", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert f"has {good} images" in out
    assert f"{bad} bad images were left out, see out/bad.jsonl" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prep", "nowhere", "out"], "data: folder 'nowhere' does not exist, expected a folder of images"),
        (["prep", "images", "out", "--size", "0"], "prep: size has 0, expected 1 to 65500"),
        (["prep", "images", "images"], "prep: 'images' holds 'class0', expected a new or empty folder"),
        (["prep", "verify", "images"], "store: 'images' has no index.mim, expected a folder that mimfast prep has"),
        (["prep", "verify", "nowhere"], "data: folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, words, message):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_disk_full(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_writer.os, "write", full)
    assert cli.main(["prep", "images", "out"]) == 2
    assert "prep: the disk of 'out' is full (No space left on device) after 0 of 12 images" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.Writer, "append", stop)
        assert cli.main(["prep", "images", "out"]) == 130
    assert "prep: stopped; the same command goes on with 'out'" in capsys.readouterr().err
    assert cli.main(["prep", "images", "out"]) == 0


def test_help(capsys):
    for words in (["prep", "--help"], ["prep", "verify", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0
    out = capsys.readouterr().out
    assert "mimfast prep verify OUT" in out
    assert "--quality" in out


def test_progress_on_a_terminal(here):
    """Share, rate and time left on the terminal; only the last line where there is none."""
    import pty

    main, other = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(mimfast.__file__).parent.parent), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "mimfast", "prep", "images", "out", "--workers", "1"]
    done = subprocess.run(command, env=env, stderr=other, stdout=subprocess.PIPE, text=True, cwd=here)
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert done.stdout.startswith("prep: 'out' has 12 images")
    assert b"12/12" in shown
    assert b"left" in shown


@pytest.mark.parametrize("format", ["jpeg", "raw"])
def test_pretrain_from_a_store(here, format):
    from mimfast.train.loop import pretrain

    assert cli.main(["prep", "images", "out", "--size", "20", "--format", format]) == 0
    outcome = pretrain(tiny_recipe(here / "out", here / "run", steps=2))
    assert outcome.stopped_by is None
    assert (here / "run" / "results.json").is_file()

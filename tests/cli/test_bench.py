"""`mimfast bench data`: what it prints and writes, and that it advises only what it has measured."""

import json

import pytest

from mimfast import cli
from mimfast.data import decoders, measure
from mimfast.data.measure import Contestant, Found, Leg, Settings
from mimfast.testing.images import write_folder
from mimfast.testing.runs import write_images

QUICK = ["--size", "16", "--batch-size", "8", "--seconds", "0.02", "--workers", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMFAST_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", 12, 2)
    return tmp_path


def test_a_folder(capsys, here):
    assert cli.main(["bench", "data", "images", *QUICK, "--json", "found.json", "--decoder", "pillow"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("images: 12 images, crops of 16 px, batches of 8, ")
    assert lines[1].split() == ["img/s,", "1", "worker", "img/s,", "2", "workers", "read", "decode", "crop", "loader",
                                "cores"]  # fmt: skip
    assert [line.split("  ")[0] for line in lines[2:5]] == ["pillow", "jpeg store, 256 px", "raw store, 256 px"]
    assert "images/s as a run loads them (2 workers, decoder pillow, cache of decoded images warm)" in out
    assert "the loader's own share: " in out
    assert "decoder: pillow is the only one measured" in out
    found = json.loads((here / "found.json").read_text())
    assert found["settings"] == {"size": 16, "batch_size": 8, "seconds": 0.02, "workers": 2, "rounds": 2}
    assert [row["workers"] for row in found["contestants"][0]["results"]] == [1, 2]
    for contestant in found["contestants"]:
        for row in contestant["results"]:
            assert 0 < row["least"] <= row["images_per_second"] <= row["most"]
            assert min(row["shares"].values()) >= 0
            assert row["images_per_cpu_second"] > 0
    assert len(found["ceiling"]["images_per_second"]) == 2
    assert found["contestants"][2]["record_bytes"] > 24 * 24 * 3


def test_a_store_of_pixels_needs_no_decoder(capsys):
    cli.main(["prep", "images", "store", "--format", "raw"])
    capsys.readouterr()
    assert cli.main(["bench", "data", "store", *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith("pixels ")
    assert "decoder: none is needed, the source keeps pixels" in out
    assert "mimfast prep" not in out


def test_bad_images_do_not_stop_it(capsys, here):
    write_folder(here / "odd")
    assert cli.main(["bench", "data", "odd", *QUICK, "--rounds", "1", "--no-prep"]) == 0
    out = capsys.readouterr().out
    assert "store" not in out


def test_a_decoder_that_is_missing_is_told_and_another_measured(capsys, monkeypatch):
    """Whatever decoders there are, one that cannot be opened says why in one line of the table."""
    known = measure.open_decoder

    def opened(name):
        if name == "other":
            raise measure.UserError("loader: decoder has 'other', expected it installed: pip install other")
        return known(name)

    monkeypatch.setattr(measure, "DECODERS", ("auto", "pillow", "other"))
    monkeypatch.setattr("mimfast.data.loader.open_decoder", opened)
    assert cli.main(["bench", "data", "images", *QUICK, "--no-prep"]) == 0
    assert "other: loader: decoder has 'other', expected it installed: pip install other\n" in capsys.readouterr().out
    assert cli.main(["bench", "data", "images", *QUICK, "--no-prep", "--decoder", "other"]) == 2
    assert capsys.readouterr().err == "loader: decoder has 'other', expected it installed: pip install other\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "weather"], "bench: what to measure has 'weather', expected data"),
        (["bench", "data", "nowhere"], "data: folder 'nowhere' does not exist"),
        (["bench", "data", "images", "--size", "0"], "bench data: size has 0, expected at least 1"),
        (["bench", "data", "images", "--seconds", "0"], "bench data: seconds has 0.0, expected more than 0"),
        (["bench", "data", "images", "--decoder", "guess"], "bench data: decoder has 'guess', expected 'auto' or"),
        (["bench", "data", "images", "--workers", "-1"], "bench data: workers has -1, expected at least 1"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, words, message):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_json_that_cannot_be_written(capsys):
    assert cli.main(["bench", "data", "images", *QUICK, "--no-prep", "--json", "no/where.json"]) == 2
    assert "bench data: --json has 'no/where.json', expected a file that can be written" in capsys.readouterr().err


def contestant(name, *rates, record_bytes=None):
    busy = {"read": 0.1, "decode": 0.6, "crop": 0.27}
    legs = [Leg(round(10 * rate), 10.0, {stage: 10 * share for stage, share in busy.items()}, 1.0, 0) for rate in rates]
    return Contestant(name, range(5), name, record_bytes, {1: legs})  # type: ignore[arg-type]


def told(contestants, stores=(), used="pillow"):
    found = Found("DIR", 5, Settings(), contestants, list(stores), {}, used, [90.0, 100.0, 95.0])
    return measure.sentences(found)


def test_sentences():
    lines = told([contestant("pillow", 100, 102, 101), contestant("quick", 200, 198, 204)])
    assert lines == [
        "ceiling: 95.0 images/s as a run loads them (1 worker, decoder pillow, cache of decoded images warm), with "
        "nobody to train on them",
        "the loader's own share: 3.0 % of a worker's time; the rest is decoding 60 %, cropping 27 %, reading 10 %",
        "decoder: quick is the fastest, 1.98x pillow: --data.decoder quick",
    ]
    lines = told([contestant("pillow", 100, 102, 101), contestant("quick", 101, 198, 204)])
    assert lines[2] == "decoder: quick and pillow are equally fast here, within what the rounds differ by"
    lines = told([contestant("pillow", 100), contestant("quick", 150)], used="quick")
    assert lines[2] == "decoder: quick is the fastest, 1.50x pillow: what a run takes by itself"


def test_a_store_is_advised_when_every_round_of_it_was_faster():
    stores = [
        contestant("jpeg store, 256 px", 101, 300, 300, record_bytes=27_000),
        contestant("raw store, 256 px", 400, 404, 410, record_bytes=196_608),
    ]
    lines = told([contestant("pillow", 100, 102, 101)], stores)
    assert lines[3:] == [
        "a jpeg store is not clearly faster here: 2.97x (27 kB an image)",
        "a raw store would load 4.0x as fast (404 against 101 images/s; 197 kB an image): mimfast prep DIR OUT "
        "--format raw --size 256",
        "stores were measured on 5 images in memory; a run gains from them what its data-wait is, and no more",
    ]


def test_every_known_decoder_is_tried():
    """A decoder that is added to DECODERS needs no word here."""
    from mimfast.data.sources import open_source

    found, missing = measure.contestants_of(open_source("images"), Settings(16, 8), [])
    assert {contestant.name for contestant in found} | set(missing) == set(decoders.DECODERS) - {"auto"}

"""The command line: layers of settings, short options, messages, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mimfast
from mimfast import cli, recipes
from mimfast.settings import to_toml
from mimfast.testing.runs import tiny_recipe, write_images

PACKAGE = Path(mimfast.__file__).parent.parent


def _read(*words):
    return cli.read_command(list(words))[0]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_file_lies_over_recipe_and_command_line_over_file(here):
    (here / "c.toml").write_text('recipe = "mae_digits"\n[optim]\nlr = 0.25\nbatch_size = 8\n[train]\nepochs = 2\n')
    recipe = _read("--config", "c.toml", "--optim.batch-size", "16")
    assert (recipe.run.name, recipe.optim.lr, recipe.optim.batch_size) == ("mae_digits", 0.25, 16)
    assert (recipe.train.steps, recipe.train.epochs) == (None, 2.0)
    assert _read("--config", "c.toml", "--steps", "5").train.steps == 5
    # a name on the command line wins over the one in the file
    assert _read("mae_photos", "--config", "c.toml").model.img_size == 64


def test_short_options_hyphens_underscores_and_equals():
    short = _read(
        "mae_photos", "--data", "d", "--out", "o", "--steps", "5", "--batch-size", "6", "--seed", "7", "--device", "cpu"
    )
    long = _read(
        "mae-photos", "--data.path=d", "--run.out=o", "--train.steps=5", "--optim.batch_size=6", "--train.seed", "7",
        "--train.device", "cpu",
    )  # fmt: skip
    assert short == long
    assert (short.data.path, short.run.out, short.train.steps) == ("d", "o", 5)
    assert _read("mae_photos", "--data.crop-scale", "0.3", "0.5", "--target.norm", "True").data.crop_scale == (0.3, 0.5)


def test_lists_and_methods_on_the_command_line(here):
    words = [
        "--progress.sizes",
        "32",
        "48",
        "64",
        "--progress.batch-sizes=8",
        "4",
        "2",
        "--progress.starts",
        "0",
        "0.5",
        "0.8",
    ]
    recipe = _read(
        "fastmim_tiny", *words, "--mask.block", "8", "--optim.schedule", "multistep", "--optim.milestones", "0.9"
    )
    assert recipe.progress == recipes.Progress((32, 48, 64), (8, 4, 2), (0.0, 0.5, 0.8))
    assert (recipe.mask.block, recipe.optim.schedule, recipe.optim.milestones) == (8, "multistep", (0.9,))
    (here / "c.toml").write_text("recipe = 'simmim_tiny'\n[progress]\nsizes = [64, 128]\n")
    recipe = _read("--config", "c.toml")
    assert (recipe.model.method, recipe.progress.sizes) == ("simmim", (64, 128))


def test_epochs_on_the_command_line_replace_the_recipes_steps():
    recipe = _read("mae_photos", "--train.epochs", "3")
    assert (recipe.train.steps, recipe.train.epochs) == (None, 3.0)


def test_a_run_without_recipe_says_which_one_it_uses(capsys):
    assert _read("--data", "digits").run.name == "mae_digits"
    assert "no recipe named: using mae_digits" in capsys.readouterr().out
    assert _read("--data", "somewhere").run.name == "mae_small"
    assert "using mae_small; mae_vit_b and larger ones are for GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["pretrian"],
            "command has 'pretrian', expected pretrain, prep, bench, export, doctor because no other exists; "
            "did you mean pretrain?",
        ),
        (["pretrain", "mae_photo"], "did you mean mae_photos?"),
        (["pretrain", "--optim.lrr", "3"], "pretrain: --optim.lrr is not an option; did you mean --optim.lr?"),
        (["pretrain", "--stepz=3"], "pretrain: --stepz is not an option; did you mean --steps?"),
        (["pretrain", "--learning-rate", "3"], "pretrain: --learning-rate is not an option"),
        (["pretrain", "--steps"], "pretrain: --train.steps has no value"),
        (["pretrain", "--data", "nowhere"], "folder 'nowhere' does not exist"),
        (["pretrain", "--data", "empty"], "folder 'empty' has no images"),
        (["pretrain", "--mask.block", "16"], "mask.block has 16, expected none because mae has masks of its own kind"),
        (["pretrain", "fastmim_tiny", "--model.encoder", "vitt"], "encoders.build: name has 'vitt'"),
        (["pretrain", "fastmim_tiny", "--mask.block", "12"], "FastMIM: block has 12, expected a multiple of 8"),
        (["pretrain", "--mask.ratio", "1"], "mask.ratio has 1.0, expected 0 <= ratio < 1"),
        (["pretrain", "--resume"], "--resume has no run to continue, expected --out DIR"),
        (["pretrain", "--resume", "--out", "empty"], "expected the folder of a run because it holds no config.toml"),
        (["pretrain", "--config", "none.toml"], "expected a TOML file because no such file or directory"),
        (["doctor", "--fast"], "doctor: the command has '--fast', expected nothing or --markdown"),
        (["export", "nowhere", "x.safetensors"], "load: source has 'nowhere'"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_two(here, capsys, words, message):
    (here / "empty").mkdir()
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (here / "runs").exists()


def test_a_value_of_the_wrong_type_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["pretrain", "mae_photos", "--optim.lr", "fast"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--optim.lr" in captured.out + captured.err


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_route", lambda argv: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main([])


def test_help_names_recipes_short_options_and_exit_codes(capsys):
    assert cli.main(["pretrain", "--help"]) == 0
    told = capsys.readouterr().out
    assert max(len(line) for line in told.splitlines()) <= 120
    for word in (
        "mae_photos",
        "mae_vit_h",
        "maskfeat_vit_b",
        "--progress.sizes",
        "--batch-size",
        "130",
        "143",
        "--optim.weight-decay",
        "torchrun",
    ):
        assert word in told
    assert cli.main([]) == 0
    assert "mimfast doctor" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mimfast.__version__


def test_pretrain_resume_and_export(here, capsys):
    images = write_images(here / "images", count=20, classes=2)
    (here / "c.toml").write_text(to_toml(tiny_recipe(images, "r")))
    assert cli.main(["pretrain", "--config", "c.toml", "--steps", "2"]) == 0
    told = capsys.readouterr().out
    for word in ("step 2/2", "Reconstruction of held-out images", "What labels find in the features", "raw pixels"):
        assert word in told
    assert cli.main(["pretrain", "--config", "c.toml"]) == 2
    assert "pass --resume to continue it or another --out" in capsys.readouterr().err
    assert cli.main(["pretrain", "--resume", "--out", "r", "--steps", "4"]) == 0
    told = capsys.readouterr().out
    assert "warning: this run is no longer the one it was, train.steps: 2 -> 4" in told
    assert "continued from step 2" in told
    assert "step 4/4" in told
    assert cli.main(["export", "r", "mae.pth", "--layout", "mae"]) == 0
    assert type(mimfast.load("mae.pth", heads=2, decoder_heads=2)).__name__ == "MAE"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_documented_code(here, number, code):
    images = write_images(here / "images")
    (here / "c.toml").write_text(to_toml(tiny_recipe(images, "r", steps=100000, checkpoint_steps=100000)))
    command = [sys.executable, "-m", "mimfast", "pretrain", "--config", "c.toml"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    with open("log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "step      3/" not in Path("log").read_text():
            assert process.poll() is None, Path("log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    told = Path("log").read_text()
    assert "continue with: mimfast pretrain --resume --out r" in told
    assert "Traceback" not in told
    assert len(list((here / "r/checkpoints").glob("step_*"))) == 1


def test_without_tyro_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["pretrain"]) == 2
    assert "pip install tyro" in capsys.readouterr().err

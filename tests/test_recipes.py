"""Recipes build, say what they need, and survive the trip through TOML; wrong settings are named with the nearest
right one.
"""

import re
from dataclasses import replace

import pytest

from mimfast import recipes, settings
from mimfast._check import UserError
from mimfast.recipes import RECIPES, Recipe


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_every_recipe_is_valid_named_after_its_function_and_documented(make):
    recipe = settings.check(make())
    assert recipe.run.name == make.__name__
    assert "Command: `" in make.__doc__
    assert "mimfast pretrain" in make.__doc__
    assert "Hardware:" in make.__doc__


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_toml_round_trip(make, tmp_path):
    recipe = make()
    (tmp_path / "c.toml").write_text(settings.to_toml(recipe, "two\nlines"))
    assert settings.override(Recipe(), settings.read_toml(tmp_path / "c.toml"), "c.toml") == recipe


def test_odd_texts_survive_toml(tmp_path):
    recipe = Recipe()
    recipe = replace(recipe, data=replace(recipe.data, path='a "b"\\c\n\t\x7f ü 写'))
    (tmp_path / "c.toml").write_text(settings.to_toml(recipe), encoding="utf-8")
    assert settings.override(Recipe(), settings.read_toml(tmp_path / "c.toml"), "c.toml") == recipe


@pytest.mark.parametrize("name", ["mae_photos", "mae_digits", "mae_small", "mae_cifar"])
def test_small_recipes_build(name):
    recipe = recipes.by_name(name)
    method = recipes.build(recipe)
    assert sum(p.numel() for p in method.parameters()) < 4e6
    assert (method.ratio, method.target.norm) == (recipe.mask.ratio, recipe.target.norm)


def test_official_learning_rate():
    assert recipes.peak_lr(recipes.mae_vit_b()) == pytest.approx(2.4e-3)
    assert recipes.mae_vit_b().optim.warmup * recipes.mae_vit_b().train.epochs == pytest.approx(40)


def test_unknown_recipe_lists_them_and_suggests():
    with pytest.raises(
        UserError, match=r"recipe has 'mae_vit_bb', expected one of mae_photos, .*; did you mean mae_vit_b\?"
    ):
        recipes.by_name("mae_vit_bb")
    assert recipes.by_name("mae-vit-b") == recipes.mae_vit_b()


def test_the_default_depends_on_the_data():
    assert [recipes.default_for(p).run.name for p in (None, "photos", "digits", "/some/dir")] == [
        "mae_photos", "mae_photos", "mae_digits", "mae_small",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask.ratio", 1.0, "mask.ratio has 1.0, expected 0 <= ratio < 1"),
        ("mask.ratio", -0.1, "mask.ratio has -0.1"),
        (
            "model.img_size",
            65,
            "model.img_size has 65, expected a multiple of 8 because patches are 8 px and 65 = 8 * 8 + 1",
        ),
        ("data.holdout", 0.0, "data.holdout has 0.0, expected a fraction between 0 and 1"),
        (
            "data.crop_scale",
            [0.9, 0.1],
            "data.crop_scale has (0.9, 0.1), expected two positive numbers in ascending order",
        ),
        ("data.crop_scale", [0.5, 1.5], "data.crop_scale has (0.5, 1.5), expected numbers up to 1"),
        ("data.workers", -1, "data.workers has -1"),
        ("optim.batch_size", 0, "optim.batch_size has 0"),
        ("optim.lr", 0.0, "optim.lr has 0.0"),
        ("train.steps", 0, "train.steps has 0"),
        ("train.steps", "none", "train.steps has None, expected a number because train.epochs is not set either"),
        ("train.log_every", 0, "train.log_every has 0"),
    ],
)
def test_values_out_of_range_are_named(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        settings.check(settings.override(recipes.mae_photos(), {key: value}, "test"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", 1.0, "the key 'optim.lrr', which is not a setting; did you mean optim.lr?"),
        ("batch_size", 8, "did you mean optim.batch_size?"),
        ("optim.lr", "fast", "optim.lr has 'fast' in x.toml, expected a number"),
        ("optim.lr", True, "optim.lr has True in x.toml, expected a number"),
        ("optim.batch_size", 2.5, "optim.batch_size has 2.5 in x.toml, expected a whole number"),
        ("target.norm", 1, "target.norm has 1 in x.toml, expected true or false"),
        ("target.kind", "l2", "target.kind has 'l2' in x.toml, expected 'mse' or 'l1' or 'smooth_l1'"),
        ("optim.betas", [0.9], "optim.betas has [0.9] in x.toml, expected 2 numbers"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        settings.override(Recipe(), {key: value}, "x.toml")


def test_setting_one_of_a_pair_clears_the_other():
    photos = recipes.mae_photos()
    by_epochs = settings.override(photos, {"train.epochs": 3}, "x")
    assert (by_epochs.train.steps, by_epochs.train.epochs) == (None, 3.0)
    assert settings.override(photos, {"train.epochs": 3, "train.steps": 7}, "x").train.steps == 7
    scaled = settings.override(photos, {"optim.base_lr": 1e-3, "optim.batch_size": 512}, "x")
    assert recipes.peak_lr(scaled) == pytest.approx(2e-3)


def test_a_file_that_is_no_toml_is_named(tmp_path):
    with pytest.raises(UserError, match="expected a TOML file because no such file or directory"):
        settings.read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match="expected a TOML file because its text is not TOML"):
        settings.read_toml(tmp_path / "bad.toml")
    (tmp_path / "loose.toml").write_text("seed = 3")
    with pytest.raises(UserError, match=r"the key 'seed' outside a section; did you mean train.seed\?"):
        settings.read_toml(tmp_path / "loose.toml")


def test_the_fingerprint_follows_what_is_learnt_only():
    one = recipes.mae_photos()
    place = settings.override(one, {"run.out": "x", "train.log_every": 7, "data.workers": 3, "score.views": 1}, "x")
    other = settings.override(one, {"optim.lr": 0.5}, "x")
    assert settings.fingerprint(one) == settings.fingerprint(place) != settings.fingerprint(other)
    assert settings.changed(one, other) == [f"optim.lr: {one.optim.lr} -> 0.5"]

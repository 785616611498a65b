"""Recipes build, say what they need, and survive the trip through TOML; wrong settings are named with the nearest
right one.
"""

import re
from dataclasses import replace

import pytest
import torch

from mimfast import recipes, settings
from mimfast._check import UserError
from mimfast.recipes import RECIPES, Recipe
from mimfast.train.schedule import lr_at


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


@pytest.mark.parametrize("name", ["fastmim_tiny", "simmim_tiny"])
def test_small_recipes_of_other_methods_build_and_step(name):
    recipe = recipes.by_name(name)
    method = recipes.build(recipe)
    assert sum(p.numel() for p in method.parameters()) < 4e6
    side = recipe.model.img_size
    img = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    loss = method(img, method.sample_mask(2, seed=1))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("make", "peak", "warmup", "betas", "clip"),
    [
        (recipes.mae_vit_b, 2.4e-3, 40, (0.9, 0.95), None),
        (recipes.fastmim_vit_b, 2.4e-3, 20, (0.9, 0.95), None),
        (recipes.fastmim_swin_b, 1.2e-3, 10, (0.9, 0.95), None),
        (recipes.simmim_vit_b, 4e-4, 10, (0.9, 0.999), 5.0),
        (recipes.simmim_swin_b, 4e-4, 10, (0.9, 0.999), 5.0),
        (recipes.maskfeat_vit_b, 1.6e-3, 30, (0.9, 0.999), 0.02),
        (recipes.mixmim_b, 1.2e-3, 40, (0.9, 0.95), None),
        (recipes.greenmim_swin_b, 2.4e-3, 40, (0.9, 0.95), None),
    ],
)
def test_official_rates(make, peak, warmup, betas, clip):
    recipe = make()
    assert recipes.peak_lr(recipe) == pytest.approx(peak)
    assert recipe.optim.warmup * recipe.train.epochs == pytest.approx(warmup)
    assert (recipe.optim.betas, recipe.optim.clip) == (betas, clip)


def test_simmim_falls_to_a_tenth_at_epoch_700():
    optim = recipes.simmim_vit_b().optim
    rates = [
        lr_at(epoch, 800, 4e-4, 0.0, optim.warmup, optim.warmup_lr, optim.schedule, optim.milestones)
        for epoch in (0, 10, 699, 700, 799)
    ]
    assert rates == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5])


def test_an_official_fastmim_has_the_published_shapes():
    with torch.device("meta"):
        state = recipes.build(recipes.fastmim_vit_b()).state_dict()
    assert state["decoder_pred.weight"].shape == (108, 256)
    assert state["decoder_blocks.0.attn.qkv.weight"].shape == (768, 256)
    assert state["pos_embed"].shape == (1, 65, 768)
    assert state["mask_token"].shape == (1, 3, 1, 1)
    assert recipes.build(recipes.fastmim_tiny()).encoder.blocks[0].attn.heads == 3


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("mae", {"mask.block": 16}, "mask.block has 16, expected none because mae has masks of its own kind"),
        ("mae", {"target.what": "hog"}, "target.what has 'hog', expected pixels because mae predicts nothing else"),
        ("fastmim", {"target.what": "local"}, "target.what has 'local', expected hog or pixels because fastmim"),
        (
            "fastmim",
            {"target.what": "pixels", "target.gaussian_window": 16},
            "target.gaussian_window has 16, expected 0",
        ),
        ("fastmim", {"model.drop_path": 0.1}, "model.drop_path has 0.1, expected 0 because fastmim drops no branches"),
        ("simmim", {}, "target.norm has True, expected False because simmim predicts plain pixels"),
        ("simmim", {"target.norm": False, "model.decoder_depth": 2}, "model.decoder_depth has 2, expected none"),
        ("maskfeat", {"target.norm": False}, "target.norm has False, expected True"),
        ("maskfeat", {"mask.block": 16}, "mask.block has 16, expected none because maskfeat has masks of its own kind"),
        ("mae", {"model.window": 7}, "model.window has 7, expected none because mae of vit_b16 has no windows of one"),
        ("greenmim", {"mask.block": 32}, "mask.block has 32, expected none because greenmim has masks of its own kind"),
        ("mixmim", {"mask.block": 32}, "mask.block has 32, expected none because mixmim has masks of its own kind"),
        (
            "mixmim",
            {"target.what": "hog"},
            "target.what has 'hog', expected pixels because mixmim predicts nothing else",
        ),
        (
            "mixmim",
            {"progress.sizes": [64, 224]},
            "progress.sizes has (64, 224), expected none because mixmim's encoder sees one size",
        ),
        ("maskfeat", {"model.drop_last": 1}, "model.drop_last has 1, expected 0 because maskfeat leaves no blocks out"),
    ],
)
def test_a_setting_that_a_method_would_not_look_at_is_refused(method, given, message):
    base = Recipe(model=replace(Recipe().model, method=method))
    with pytest.raises(UserError) as told:
        settings.check(settings.override(replace(base, train=replace(base.train, steps=1)), given, "test"))
    assert message in str(told.value)


def test_swinv2_has_its_published_windows_and_target():
    with torch.device("meta"):
        method = recipes.build(recipes.simmim_swinv2_b())
    assert [place.window for place in method.encoder.places] == [12, 12, 12, 6]
    assert (type(method.target).__name__, method.target.window, method.target.kind) == ("LocalNormPixels", 47, "l1")
    with torch.device("meta"):
        method = recipes.build(settings.override(recipes.simmim_swin_b(), {"model.window": 12}, "test"))
    assert method.encoder.config["window"] == 12


@pytest.mark.parametrize("name", ["mixmim_tiny", "greenmim_tiny"])
def test_small_recipes_without_mask_tokens_build_and_step(name):
    recipe = recipes.by_name(name)
    method = recipes.build(recipe)
    assert sum(p.numel() for p in method.parameters()) < 3e6
    side = recipe.model.img_size
    img = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    loss = method(img, method.sample_mask(2, seed=1))
    loss.backward()
    assert loss.isfinite()


def test_recipes_are_described():
    assert recipes.describe(recipes.simmim_swinv2_b()) == "SimMIM, swinv2_b (windows of 12)"
    assert recipes.describe(recipes.mixmim_b()) == "MixMIM, mixswin_b"
    assert recipes.describe(recipes.fastmim_tiny()).startswith("FastMIM, ViT (")
    assert recipes.describe(recipes.simmim_vit_b()) == "SimMIM, beit_b16"
    assert recipes.describe(recipes.maskfeat_vit_b()) == "MaskFeat, vit_b16"
    assert recipes.describe(settings.override(recipes.fastmim_vit_b(), {"model.drop_last": 3}, "")) == (
        "FastMIM, vit_b16 (6 heads, without its last 3 blocks)"
    )
    assert recipes.sizes(recipes.fastmim_p_vit_b()) == "128, 160, 192, 224 px"


def test_every_section_of_learning_is_in_the_fingerprint():
    base = recipes.fastmim_tiny()
    given = {"mask.block": 16, "target.gaussian_window": 16, "model.drop_last": 1, "data.resample": "bilinear"}
    given |= {"progress.sizes": [32, 64], "optim.schedule": "multistep", "optim.warmup_lr": 1e-6}
    prints = [settings.fingerprint(settings.override(base, {key: value}, "")) for key, value in given.items()]
    assert len({settings.fingerprint(base), *prints}) == 1 + len(given)


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
        ("data.cache_side", 0, "data.cache_side has 0, expected 1 to 65536 because it is a side in pixels"),
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
    place = settings.override(place, {"data.cache": "host"}, "x")
    other = settings.override(one, {"optim.lr": 0.5}, "x")
    copies = settings.override(one, {"data.cache_side": 128}, "x")
    assert settings.changed(one, copies) == ["data.cache_side: None -> 128"]
    assert settings.fingerprint(one) == settings.fingerprint(place) != settings.fingerprint(other)
    assert settings.changed(one, other) == [f"optim.lr: {one.optim.lr} -> 0.5"]

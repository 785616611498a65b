"""Probes find what is there, do not find what is not, and repeat."""

import pytest
import torch

from mimfast import probe, recipes
from mimfast.data.sources import open_source, split
from mimfast.testing.runs import tiny_recipe, write_images

CPU = torch.device("cpu")


def _clouds(count, shift, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 3
    centre = torch.eye(3, 8) * shift + 5
    return centre[label] + torch.randn(count, 8, generator=g), label


def test_separate_clouds_are_found_and_repeat():
    train, test = _clouds(300, 8.0), _clouds(90, 8.0, seed=1)
    assert probe.knn(*train, *test, k=20) > 0.97
    first = probe.linear(*train, *test, classes=3)
    assert first > 0.97
    assert probe.linear(*train, *test, classes=3) == first


def test_noise_gives_chance():
    train, test = _clouds(300, 0.0), _clouds(300, 0.0, seed=1)
    assert probe.knn(*train, *test, k=20) == pytest.approx(1 / 3, abs=0.1)
    assert probe.linear(*train, *test, classes=3) == pytest.approx(1 / 3, abs=0.1)


def test_knn_against_a_plain_calculation():
    train, label = _clouds(60, 2.0)
    test, truth = _clouds(20, 2.0, seed=5)
    centre = train.mean(0)
    right = 0
    for x, y in zip(test, truth):
        near = torch.cosine_similarity(train - centre, (x - centre)[None]).sort(descending=True)
        votes = [0.0, 0.0, 0.0]
        for similarity, index in zip(near.values[:5], near.indices[:5]):
            votes[label[index]] += float(((similarity - 1) / 0.07).exp())
        right += votes.index(max(votes)) == y
    assert probe.knn(train, label, test, truth, k=5) == right / 20


def test_a_feature_that_never_changes_and_one_image_per_class_do_no_harm():
    train, label = _clouds(30, 8.0)
    train[:, 7] = 4.0
    test = train.clone()
    test[:, 7] = 5.0
    assert probe.linear(train, label, test, label, classes=3) > 0.9
    assert probe.linear(train[:3], label[:3], train[:3], label[:3], classes=3) == 1.0


def test_scale_of_the_features_does_not_matter():
    train, test = _clouds(300, 3.0), _clouds(90, 3.0, seed=1)
    small = probe.linear(train[0] * 1e-4, train[1], test[0] * 1e-4, test[1], classes=3)
    assert small == pytest.approx(probe.linear(*train, *test, classes=3), abs=0.02)


def test_features_are_the_mean_patch_token():
    encoder = recipes.build(tiny_recipe("", "")).encoder
    img = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    found = probe.features(encoder, img, CPU, batch=2)
    torch.testing.assert_close(found, encoder(img)[:, 1:].mean(1).detach())
    assert encoder.training


def test_a_whole_probe_of_coloured_classes(tmp_path):
    recipe = tiny_recipe(write_images(tmp_path / "images", count=36, classes=3), tmp_path)
    train, held_out = split(open_source(recipe.data.path), recipe.data.holdout)
    torch.manual_seed(recipe.train.seed)
    method = recipes.build(recipe)
    state = torch.get_rng_state()
    found = probe.run(method, train, held_out, recipe, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found.rows) == ["trained encoder", "same encoder, untrained", "raw pixels"]
    # this method has not been trained yet, so it must be the one at its initial weights
    assert found.rows["trained encoder"] == found.rows["same encoder, untrained"]
    assert found.rows["raw pixels"][1] > 0.8
    assert (found.classes, found.test) == (3, len(held_out))
    assert found.neighbours <= len(train) // 3


def test_without_labels_there_is_no_probe(tmp_path):
    recipe = tiny_recipe(write_images(tmp_path / "images"), tmp_path)
    train, held_out = split(open_source(recipe.data.path), recipe.data.holdout)
    assert probe.run(recipes.build(recipe), train, held_out, recipe, CPU) is None

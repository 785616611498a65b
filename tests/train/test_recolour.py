"""Colours change per image, the same way for any batch, and keep their range."""

import torch

from mimfast.train.recolour import recolour


def _batch(count):
    img = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return img, torch.arange(100, 100 + count), torch.arange(count) % 3


def test_nothing_changes_at_strength_zero_or_to_the_input():
    img, ids, epochs = _batch(2)
    before = img.clone()
    assert recolour(img, ids, epochs, 0, 0.0) is img
    assert not torch.equal(recolour(img, ids, epochs, 0, 0.5), before)
    assert torch.equal(img, before)


def test_an_image_changes_the_same_way_in_any_batch_and_another_way_in_another_epoch():
    img, ids, epochs = _batch(6)
    whole = recolour(img, ids, epochs, 7, 0.5)
    assert whole.dtype == torch.uint8
    parts = [recolour(img[i : i + 2], ids[i : i + 2], epochs[i : i + 2], 7, 0.5) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, recolour(img, ids, epochs + 1, 7, 0.5))
    assert not torch.equal(whole, recolour(img, ids, epochs, 8, 0.5))


def test_at_a_tiny_strength_only_the_channels_are_swapped_in_every_order():
    img, ids, epochs = _batch(64)
    done = recolour(img, ids, epochs, 0, 1e-6)
    orders = set()
    for before, after in zip(img, done):
        order = tuple(next(c for c in range(3) if torch.equal(before[c], channel)) for channel in after)
        assert sorted(order) == [0, 1, 2]
        orders.add(order)
    assert len(orders) == 6

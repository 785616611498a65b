"""Random weights in transformers' ViTMAEForPreTraining, converted, same masks: same loss, predictions and gradients."""

import pytest
import torch

from mimfast import Mask, load
from mimfast._names import from_hf
from mimfast.methods import MAE

transformers = pytest.importorskip("transformers", reason="transformers is the peer: pip install 'mimfast[hf]'")


def config(**changes: object):
    values = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "image_size": 64,
        "patch_size": 8,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 128,
        # theirs defaults to 1e-12; the official code, and ours, has 1e-6
        "layer_norm_eps": 1e-6,
    }
    return transformers.ViTMAEConfig(**{**values, **changes})


def peer(norm: bool):
    """Every weight random, biases, layer norms and position tables too, so that a swapped pair cannot pass.

    (Some releases of transformers leave the position tables at zero until a checkpoint is loaded.)
    """
    model = transformers.ViTMAEForPreTraining(config(norm_pix_loss=norm))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.3)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("norm", [True, False])
def test_loss_predictions_and_gradients_are_those_of_transformers(norm: bool, attention: str) -> None:
    theirs = peer(norm)
    theirs.set_attn_implementation(attention)
    ours = load(theirs.state_dict(), heads=3, decoder_heads=4, norm=norm, ratio=0.75)
    assert isinstance(ours, MAE)
    img = torch.randn(3, 3, 64, 64)
    out = theirs(pixel_values=img, noise=torch.rand(3, 64))
    mask = Mask.from_hidden(out.mask.bool())
    loss, pred = ours(img, mask), ours.predict(img, mask)
    assert torch.allclose(loss, out.loss, rtol=1e-5)
    assert torch.allclose(pred, out.logits, rtol=1e-5, atol=1e-5 * out.logits.abs().max().item())
    loss.backward()
    out.loss.backward()
    # the position tables have no gradient on either side: they are fixed
    grads = from_hf({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    compared = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert name.endswith("pos_embed")
            continue
        flat = name.removeprefix("encoder.")
        if name.startswith("decoder."):
            flat = "mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)
        wanted = grads.pop(flat)
        assert torch.allclose(parameter.grad, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item()), name
        compared += 1
    assert not grads
    assert compared == 2 + 12 * 5 + 10


def test_names_and_shapes_of_the_real_size() -> None:
    with torch.device("meta"):
        theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig()).state_dict()
        ours = MAE.build("vit_b16", 224).state_dict()
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (ours, from_hf(theirs))]
    assert shapes[0] == shapes[1]

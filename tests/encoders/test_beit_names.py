"""Files of BEiT's architecture in and out."""

import pytest
import torch
from torch import Tensor, nn

from mimfast._check import UserError
from mimfast.encoders import BEiT
from mimfast.encoders.beit_names import fine_tuning_names, read_beit

TIMM = "timm is the peer of this test: pip install 'mimfast[timm]'"
TABLE = "relative_position_bias_table"


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.3)
    return model


def tiny(**options) -> BEiT:
    return randomised(BEiT(32, patch=8, dim=32, depth=2, heads=2, **options))


def peer(**options) -> nn.Module:
    beit = pytest.importorskip("timm.models.beit", reason=TIMM)
    sizes = {"num_classes": 0, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}
    return randomised(beit.Beit(32, 8, use_abs_pos_emb=False, use_rel_pos_bias=True, **sizes, **options))


@pytest.mark.parametrize("options", [{}, {"relative": "block", "mask_token": False}, {"positions": "learned"}])
def test_our_own(options: dict) -> None:
    ours, img = tiny(**options), torch.randn(2, 3, 32, 32)
    again = read_beit(ours.state_dict())
    assert again.config == ours.config
    assert torch.equal(again(img), ours(img))


def test_simmims_file_with_decoder_and_buffers() -> None:
    ours, img = tiny(), torch.randn(2, 3, 32, 32)
    state: dict[str, Tensor] = {f"encoder.{name}": x for name, x in ours.state_dict().items()}
    state |= {"decoder.0.weight": torch.zeros(192, 32, 1, 1), "decoder.0.bias": torch.zeros(192)}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    assert torch.equal(read_beit(state)(img), ours(img))


def test_timms_model() -> None:
    theirs, img = peer(global_pool="token"), torch.randn(2, 3, 32, 32)
    ours = read_beit(theirs.state_dict())
    assert (ours.relative, ours.heads, ours.depth, ours.mask_modes) == ("block", 2, 2, {"paint"})
    torch.testing.assert_close(ours(img), theirs.forward_features(img), rtol=1e-5, atol=1e-5)


def test_timms_model_that_normalises_after_the_mean() -> None:
    theirs, img = peer(global_pool="avg"), torch.randn(2, 3, 32, 32)
    ours = read_beit(theirs.state_dict())
    torch.testing.assert_close(ours.features(img)[-1], theirs.forward_features(img), rtol=1e-5, atol=1e-5)
    assert ours.norm.weight.unique().tolist() == [1]


def test_export_for_fine_tuning_loads_strictly_into_timm() -> None:
    ours, theirs, img = tiny(), peer(global_pool="token"), torch.randn(2, 3, 32, 32)
    state = fine_tuning_names(ours.state_dict())
    theirs.load_state_dict(state, strict=True)
    torch.testing.assert_close(theirs.forward_features(img), ours(img), rtol=1e-5, atol=1e-5)
    assert state[f"blocks.0.attn.{TABLE}"].data_ptr() != state[f"blocks.1.attn.{TABLE}"].data_ptr()
    prefixed = {f"encoder.{name}": x for name, x in ours.state_dict().items()}
    assert fine_tuning_names(prefixed).keys() == state.keys()


def test_another_size_resizes_the_tables() -> None:
    ours, img = tiny(), torch.randn(2, 3, 48, 64)
    other = read_beit(ours.state_dict(), img_size=(48, 64))
    assert other.grid == (6, 8)
    assert isinstance(other.rel_pos_bias.relative_position_bias_table, nn.Parameter)
    assert torch.equal(other(img), ours.at((48, 64))(img))
    assert read_beit(ours.state_dict(), img_size=32).grid == (4, 4)


def test_refuses_other_files() -> None:
    state = tiny().state_dict()
    with pytest.raises(UserError, match=r"read_beit: state has names like a, expected those of BEiT with 'patch_embed"):
        read_beit({"a": torch.zeros(1)})
    with pytest.raises(UserError, match=r"state has no blocks.1.attn.proj.bias, expected shape \(32,\)"):
        read_beit({name: x for name, x in state.items() if name != "blocks.1.attn.proj.bias"})
    with pytest.raises(UserError, match=r"state has blocks.0.attn.w \(1,\), expected none because the other shapes"):
        read_beit(state | {"blocks.0.attn.w": torch.zeros(1)})
    with pytest.raises(UserError, match=r"state has norm.bias \(31,\), expected shape \(32,\)"):
        read_beit(state | {"norm.bias": torch.zeros(31)})
    with pytest.raises(UserError, match="state has neither a table of relative bias nor positions"):
        read_beit(tiny(relative="none").state_dict())

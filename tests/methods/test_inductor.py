"""The compiler a user gets by default, on a small MAE: one graph, the same loss and gradients."""

import pytest
import torch

from mimfast.methods import MAE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_compiled_step_equals_the_eager_one(dtype):
    torch.manual_seed(0)
    model = MAE.build("vit", 32, patch=8, dim=32, depth=2, heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2)
    img = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    img = img if dtype == torch.uint8 else img / 255 - 0.5
    mask = model.sample_mask(2)
    compiled = torch.compile(model, fullgraph=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted, found = model(img, mask), compiled(img, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights))
    for found_grad, wanted_grad in pairs:
        torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-4, atol=1e-6)

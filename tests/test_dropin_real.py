"""mimfast.accelerate on models at their real sizes: output and gradients before and after, by the tolerance rule."""

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
from mimfast.testing.parity import MODELS, measure

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_before_and_after(name):
    row = measure(name)
    print(row)
    assert row.passed, row

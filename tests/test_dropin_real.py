"""mimfast.accelerate on models at their real sizes: output and gradients before and after, by the tolerance rule.

Both in float32 against the same model in float64, for one random weighting of the output. All of it is slow.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimfast
from mimfast.testing.parity import MODELS, measure

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_before_and_after(name):
    row = measure(name)
    print(row)
    assert row.swapped == row.known > 0

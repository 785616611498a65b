"""Shared set-up: Triton's interpreter where there is no GPU, fixed seeds and threads."""

import os
import sys

import pytest
import torch

# before anything imports triton: its decorator reads this once
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compilations() -> None:
    """What torch.compile remembers of one test would count against the next one's limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def device() -> str:
    """Where op tests put their tensors: the GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"

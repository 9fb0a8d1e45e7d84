"""Models over a paged cache, driven by hand: no scheduler, no executor."""

import pytest
import torch

import pagedcore_models
from pagedcore.execution.checkpoint import read_config
from pagedcore.testing.paged_model import PagedModel


@pytest.fixture(scope="session")
def paged():
    """Makes the PagedModel of a folder."""

    def paged(folder, **options):
        (architecture,) = read_config(folder)["architectures"]
        return PagedModel(folder, pagedcore_models.pagedcore_models()[architecture](), **options)

    return paged


@pytest.fixture(scope="session")
def prompts():
    """Four prompts of different lengths, of tokens that all tiny models have."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 320, (length,), generator=generator).tolist() for length in (37, 5, 1, 18)
    ]

"""Every family passes the model kit (`pagedcore_model_cases`)."""

import pytest
import torch

import pagedcore_models
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.model_kit import LIES, Backend, model_checks

MODELS = pagedcore_models.pagedcore_models()
CASES = pagedcore_models.pagedcore_model_cases()
TORCH = Backend(name="torch", make=TorchOps)

CHECKS = [
    check
    for architecture, case in CASES.items()
    for check in model_checks(architecture, MODELS[architecture], case, [TORCH])
]


@pytest.mark.parametrize("check", [c for c in CHECKS if c.claim != LIES], ids=str)
def test_a_family_computes_what_transformers_computes_in_every_schedule(check):
    assert check().startswith("within")


@pytest.mark.parametrize("check", [c for c in CHECKS if c.claim == LIES], ids=str)
def test_a_family_refuses_a_config_that_lies(check):
    assert " refused" in check()


def test_every_family_is_checked_in_both_types():
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        subjects = {check.subject for check in CHECKS if check.claim == f"{word}, torch"}
        assert subjects == {f"model {name}" for name in CASES}

"""Every format passes the quantizer kit (`pagedcore_quantizer_cases`)."""

import pytest

from pagedcore.testing.quantizer_kit import quantizer_checks
from pagedcore.testing.written_blocks import GGUF_KINDS
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_quantization import pagedcore_quantizer_cases, pagedcore_quantizers

QUANTIZERS = pagedcore_quantizers()
CASES = pagedcore_quantizer_cases()
ALL = [case for main in CASES.values() for case in (main, *main.variants.values())]
CHECKS = [
    check
    for name, case in CASES.items()
    for check in quantizer_checks(name, QUANTIZERS[name], case)
]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_format_keeps_what_it_promises(check):
    said = check()
    assert not (check.claim.endswith("experts") and said.startswith("refused")), said


def test_every_format_has_a_case():
    assert CASES.keys() == QUANTIZERS.keys()


def test_every_way_to_store_a_matrix_has_a_case():
    settings = [case.settings for case in ALL]
    assert [name for name, form in WRITTEN.items() if form.config not in settings] == []
    types = {kind for case in ALL for kind in case.settings.get("types", {}).values()}
    assert types == set(GGUF_KINDS)


def test_every_stored_format_says_what_its_tensors_stand_for():
    assert [case.settings for case in ALL if case.settings and case.stands_for is None] == []

"""Each architecture that is offered has a case for the model kit (`pagedcore_model_cases`)."""

import pagedcore_models


def test_every_architecture_that_is_offered_has_a_case():
    offered = pagedcore_models.pagedcore_models().keys() - {"*"}
    assert sorted(pagedcore_models.pagedcore_model_cases()) == sorted(offered)


def test_every_case_has_every_kind_of_layer_within_the_kits_longest_prompt():
    for case in pagedcore_models.pagedcore_model_cases().values():
        assert (case.config.get("sliding_window") or 8) < 37, case.family

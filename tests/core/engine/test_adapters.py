"""Adapters (LoRA) in a whole engine: beside each other, in and out at run time."""

import copy

import pytest
import torch

from pagedcore import SamplingParams
from pagedcore.errors import ConfigError, MissingError, RequestError
from pagedcore.testing.drawn_adapters import linear_shapes, save_drawn_adapter
from pagedcore.testing.tiny_models import greedy_tokens

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"whole": ALL, "some": ("q_proj", "v_proj"), "mlp": ("gate_proj", "down_proj")}
PROMPT = [5, 99, 7, 140, 33, 8, 61, 250, 17, 2, 77, 45, 12, 90, 31, 64, 201, 3, 18]
NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


class Adapters:
    """Folders of adapters for a tiny model, and what it says with each merged into it."""

    def __init__(self, tiny, folder):
        self.folder = folder
        self.merged = {None: tiny.greedy(PROMPT, NUM_TOKENS)}
        for seed, (name, targets) in enumerate(TARGETS.items()):
            shapes = linear_shapes(tiny.reference, *targets)
            changes = save_drawn_adapter(
                folder / name, shapes, seed=seed, rank=3 + seed, use_rslora=name == "mlp"
            )
            model = copy.deepcopy(tiny.reference)
            with torch.no_grad():
                for layer, change in changes.items():
                    model.get_submodule(layer).weight.add_(change)
            self.merged[name] = greedy_tokens(model, PROMPT, NUM_TOKENS)
        assert len({tuple(tokens) for tokens in self.merged.values()}) == 1 + len(TARGETS)

    @property
    def modules(self):
        return [f"{name}={self.folder / name}" for name in TARGETS]


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    return Adapters(tiny, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def llm(tiny, adapters):
    with tiny.llm(
        enable_lora=True, max_loras=2, max_cpu_loras=4, lora_modules=adapters.modules
    ) as llm:
        yield llm


def tokens_of(llm, name, params=GREEDY):
    [output] = llm.generate([PROMPT], params, adapter=name)
    return output.outputs[0].token_ids


def run_together(llm, names):
    """What each name says, all asked for before a step runs; and how many ran at most."""
    streams = [llm.stream(PROMPT, GREEDY, adapter=name) for name in names]
    said = [[] for _ in names]
    live = list(range(len(names)))
    while live:
        for i in list(live):
            item = next(streams[i], None)
            if item is None:
                live.remove(i)
            else:
                said[i] = item.outputs[0].token_ids
    return said


@pytest.mark.parametrize("name", [None, *TARGETS])
def test_an_adapter_says_what_the_model_says_with_it_merged(llm, adapters, name):
    assert tokens_of(llm, name) == adapters.merged[name]


def test_several_adapters_and_none_share_a_batch(llm, adapters):  # LORA-1
    names = ["whole", None, "some", "whole", None]
    assert run_together(llm, names) == [adapters.merged[name] for name in names]


def test_more_adapters_than_slots_wait_for_each_other(llm, adapters):  # LORA-1
    names = ["whole", "some", "mlp", "whole", "some", "mlp", None]
    assert run_together(llm, names) == [adapters.merged[name] for name in names]


def test_weights_of_few_bits_have_adapters_too(tiny, adapters):
    options = dict(quantization="fp8", enable_lora=True, lora_modules=adapters.modules[:1])
    with tiny.llm() as exact, tiny.llm(**options) as llm:
        assert tokens_of(llm, None)[:2] == tokens_of(exact, None)[:2]
        assert tokens_of(llm, "whole")[:2] == adapters.merged["whole"][:2]
        assert adapters.merged["whole"][:2] != adapters.merged[None][:2]


def test_choices_of_one_request_have_its_adapter(llm, adapters):
    params = SamplingParams(temperature=1e-2, n=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    [output] = llm.generate([PROMPT], params, adapter="some")
    assert [choice.token_ids for choice in output.outputs] == 3 * [adapters.merged["some"]]


def test_a_prefix_of_one_adapter_is_not_found_by_another(tiny, adapters):  # KV-3
    with tiny.llm(enable_lora=True, lora_modules=adapters.modules[:1]) as llm:

        def cached(name):
            return llm.generate([PROMPT], GREEDY, adapter=name)[0].num_cached_tokens

        assert [cached("whole"), cached(None)] == [0, 0]
        assert cached("whole") == cached(None) > 0


def test_another_adapter_of_the_same_name_finds_nothing_of_the_first(tiny, adapters):  # KV-3
    with tiny.llm(enable_lora=True) as llm:
        for folder in ("whole", "some"):
            llm.load_adapter("mine", adapters.folder / folder)
            [output] = llm.generate([PROMPT], GREEDY, adapter="mine")
            assert output.num_cached_tokens == 0
            assert output.outputs[0].token_ids == adapters.merged[folder]
            llm.unload_adapter("mine")


def test_what_runs_goes_on_after_its_adapter_was_unloaded(tiny, adapters):  # LORA-2
    with tiny.llm(enable_lora=True, lora_modules=adapters.modules[:1]) as llm:
        stream = llm.stream(PROMPT, GREEDY, adapter="whole")
        next(stream)
        llm.unload_adapter("whole")
        with pytest.raises(MissingError, match=r"`whole` does not exist"):
            llm.generate([PROMPT], GREEDY, adapter="whole")
        *_, last = stream
        assert last.outputs[0].token_ids == adapters.merged["whole"]


def test_memory_of_what_still_runs_counts(tiny, adapters):
    with tiny.llm(enable_lora=True, lora_modules=adapters.modules[:1]) as llm:
        stream = llm.stream(PROMPT, GREEDY, adapter="whole")
        next(stream)
        llm.unload_adapter("whole")
        with pytest.raises(RequestError, match=r"still run.*--max-cpu-loras"):
            llm.load_adapter("some", adapters.folder / "some")
        list(stream)
        llm.load_adapter("some", adapters.folder / "some")
        assert tokens_of(llm, "some") == adapters.merged["some"]


def test_an_unknown_adapter_is_missing(llm):
    with pytest.raises(MissingError, match=r"`nobody` does not exist") as caught:
        llm.generate([PROMPT], GREEDY, adapter="nobody")
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_root": "/"}, "need enable_lora"),
        ({"enable_lora": True, "max_loras": 0}, r"max_loras must be in 1\.\."),
        ({"enable_lora": True, "max_lora_rank": 1000}, r"max_lora_rank must be in 1\.\."),
        ({"enable_lora": True, "max_loras": 4, "max_cpu_loras": 2}, "at least max_loras"),
        ({"enable_lora": True, "lora_modules": "alone"}, "name=folder"),
        ({"enable_lora": True, "lora_modules": ("a=/x", "a=/y")}, "twice"),
    ],
)
def test_settings_that_cannot_be_say_so(tiny, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny.llm(**options)


def test_a_module_that_cannot_be_loaded_ends_the_start_by_name(tiny, adapters):
    with pytest.raises(ConfigError, match=r"lora_modules: 'some'.*at most 1"):
        tiny.llm(enable_lora=True, lora_modules=adapters.modules[:2])


def test_an_engine_without_room_says_what_would_make_it(tiny, adapters):
    with tiny.llm() as llm, pytest.raises(RequestError, match="--enable-lora"):
        llm.load_adapter("whole", adapters.folder / "whole")

"""Every sampling field in every way that the engine runs, against a model of the rules (IN-12).

The model of the rules computes each token from the whole text so far, with transformers' logits.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from pagedcore import SamplingParams
from pagedcore.request import RepetitionDetection, field_names
from pagedcore.testing.tiny_models import END
from pagedcore.text.tokenizer import Tokenizer

MAX_LEN = 96
PROMPT = np.random.default_rng(3).integers(0, 256, 45).tolist()
LETTERS = tuple(range(64, 90))
"""Tokens a to z: outputs of these can be read."""

MODES = {
    "plain": dict(enable_prefix_caching=False),
    "chunked": dict(max_num_batched_tokens=7, max_num_seqs=4),
    "cached": {},
    "preempted": dict(block_size=4, num_gpu_blocks_override=25),
    "in flight": dict(in_flight=True),
    "in flight, chunked, preempted": dict(
        in_flight=True,
        max_num_batched_tokens=9,
        max_num_seqs=4,
        block_size=4,
        num_gpu_blocks_override=25,
    ),
    "n=3": {},
    "n=3, in flight, few rows": dict(in_flight=True, max_num_seqs=2),
}

CASES = {
    "greedy": {},
    "almost no temperature": dict(temperature=1e-6, top_p=0.5),
    "one candidate": dict(temperature=1.3, top_k=1),
    "a nucleus of one": dict(temperature=1.3, top_p=1e-6),
    "as likely as the likeliest": dict(temperature=0.5, min_p=1.0),
    "letters": dict(allowed_token_ids=LETTERS),
    "presence penalty": dict(allowed_token_ids=LETTERS[:6], presence_penalty=2.0),
    "frequency penalty": dict(allowed_token_ids=LETTERS[:6], frequency_penalty=1.5),
    "frequency reward": dict(allowed_token_ids=LETTERS[:6], frequency_penalty=-2.0),
    "repetition penalty": dict(allowed_token_ids=LETTERS[:6], repetition_penalty=4.0),
    "repetition reward": dict(allowed_token_ids=LETTERS, repetition_penalty=0.25),
    "all penalties": dict(
        allowed_token_ids=LETTERS[:9],
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
    ),
    "biased towards a token": dict(logit_bias={7: 100}),
    "biased away from tokens": dict(logit_bias=dict.fromkeys(range(160), -100.0)),
    "a bias that is clamped": dict(logit_bias={7: 1e9, 8: 99.0}),
    "bad words": dict(allowed_token_ids=LETTERS, bad_words=["BASE[1:3]", "BASE[5:6]", "zq"]),
    "the end": dict(logit_bias={END: 100}),
    "the end ignored": dict(logit_bias={END: 100}, ignore_eos=True),
    "the end delayed": dict(logit_bias={END: 100}, min_tokens=4),
    "nothing but the end": dict(allowed_token_ids=[END], min_tokens=4),
    "the end shown": dict(
        logit_bias={END: 100},
        min_tokens=2,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    ),
    "special tokens shown": dict(
        logit_bias={END: 100},
        ignore_eos=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    ),
    "stop token": dict(allowed_token_ids=LETTERS, stop_token_ids=["BASE[4:5]"]),
    "stop token shown": dict(
        allowed_token_ids=LETTERS, stop_token_ids=["BASE[4:5]"], include_stop_str_in_output=True
    ),
    "stop token delayed": dict(
        allowed_token_ids=LETTERS, stop_token_ids=["BASE[4:5]", "BASE[1:2]"], min_tokens=7
    ),
    "stop string": dict(allowed_token_ids=LETTERS, stop=["nowhere", "BASE[3:6]"]),
    "stop string shown": dict(
        allowed_token_ids=LETTERS, stop=["BASE[3:6]"], include_stop_str_in_output=True
    ),
    "stop string delayed": dict(
        allowed_token_ids=LETTERS, stop=["BASE[1:4]", "BASE[6:9]", "BASE[7:9]"], min_tokens=5
    ),
    "repetition": dict(
        allowed_token_ids=LETTERS[:1],
        repetition_detection=RepetitionDetection(max_pattern_size=2, min_count=5),
    ),
    "one token": dict(max_tokens=1),
    "no limit": dict(max_tokens=None, ignore_eos=True),
    "log-probability of the token": dict(logprobs=0),
    "log-probabilities": dict(logprobs=3),
    "log-probabilities of all": dict(logprobs=-1, max_tokens=3),
    "log-probabilities of the unlikely": dict(
        logprobs=2, allowed_token_ids=LETTERS, presence_penalty=1.0
    ),
    "prompt log-probabilities": dict(prompt_logprobs=2),
    "both log-probabilities": dict(prompt_logprobs=0, logprobs=1, max_tokens=2),
    "no text": dict(detokenize=False),
    "no reading of the cache": dict(skip_reading_prefix_cache=True),
    "all at once": dict(
        allowed_token_ids=(*LETTERS, END),
        bad_words=["BASE[1:3]"],
        logit_bias={END: 6.0, 66: 1.5, 70: -3.0},
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.2,
        min_tokens=6,
        stop=["BASE[9:11]", "zz"],
        stop_token_ids=[89],
        logprobs=2,
        prompt_logprobs=1,
        max_tokens=20,
    ),
}

HERE = {"n", "seed", "output_kind", "logits_processors"}
"""Fields that are no column of the matrix: modes, and tests of their own."""

WITHOUT_EFFECT = {
    "greedy",
    "almost no temperature",
    "one candidate",
    "a nucleus of one",
    "as likely as the likeliest",
    "no reading of the cache",
}
"""Cases whose answer is the greedy one."""


@dataclass
class Answer:
    """What the rules say must come out."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[np.ndarray] = field(default_factory=list)
    """Of the whole vocabulary, at each output token."""


class Rules:
    """Semantics 4.1 to 4.3 for greedy requests, one whole text at a time."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.tokenizer = Tokenizer.from_folder(tiny.folder)
        self._known = {}

    def params(self, case):
        """The parameters of a case; "BASE[i:j]" is a piece of what letters alone give."""
        options = {"temperature": 0.0, "max_tokens": 12, **CASES[case]}
        for name in ("bad_words", "stop", "stop_token_ids"):
            if name in options:
                options[name] = [self._piece(item) for item in options[name]]
                if name == "stop_token_ids":
                    texts = (i for i in options[name])
                    options[name] = [
                        i if isinstance(i, int) else self.tokenizer.encode(i)[0] for i in texts
                    ]
        return SamplingParams(**options)

    def _piece(self, item):
        if not str(item).startswith("BASE["):
            return item
        begin, end = map(int, item[5:-1].split(":"))
        return self.answer("letters").text[begin:end]

    def answer(self, case):
        if case not in self._known:
            self._known[case] = self._answer(self.params(case))
        return self._known[case]

    def _answer(self, params):
        answer = Answer()
        while answer.finish_reason is None:
            logits = self.tiny.logits(PROMPT + answer.token_ids)[-1].double()
            answer.logprobs.append(logits.log_softmax(-1).numpy())
            edited = self._edited(logits.numpy().copy(), answer.token_ids, params)
            answer.token_ids.append(int(edited.argmax()))
            self._end(answer, params)
        return answer

    def _edited(self, logits, outputs, params):
        if params.allowed_token_ids is not None:
            logits[[i for i in range(len(logits)) if i not in params.allowed_token_ids]] = -np.inf
        for word in params.bad_words:
            for ids in (self.tokenizer.encode(word), self.tokenizer.encode(" " + word)):
                if (
                    outputs[len(outputs) - len(ids) + 1 :] == ids[:-1]
                    and len(ids) <= len(outputs) + 1
                ):
                    logits[ids[-1]] = -np.inf
        if len(outputs) < params.min_tokens:
            logits[[END, *params.stop_token_ids]] = -np.inf
            if logits.max() == -np.inf:  # STOP-3
                logits[END] = 0
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += max(-100, min(100, bias))
        for token in {*PROMPT, *outputs}:
            by = params.repetition_penalty
            logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
        for token in set(outputs):
            logits[token] -= params.frequency_penalty * outputs.count(token)
            logits[token] -= params.presence_penalty
        return logits

    def _end(self, answer, params):
        outputs = answer.token_ids
        token, count = outputs[-1], len(outputs)
        limit = MAX_LEN - len(PROMPT) if params.max_tokens is None else params.max_tokens
        if token == END and not params.ignore_eos:
            answer.finish_reason = "stop"
        elif token in params.stop_token_ids:
            answer.finish_reason, answer.stop_reason = "stop", token
        elif count >= limit:
            answer.finish_reason = "length"
        elif params.repetition_detection is not None and count >= params.min_tokens:
            most, least = params.repetition_detection.max_pattern_size, 5
            tails = [outputs[-size * least :] for size in range(1, most + 1)]
            if any(
                len(tail) == size * least and tail[size:] == tail[:-size]
                for size, tail in enumerate(tails, 1)
            ):
                answer.finish_reason = "repetition"
        shown = outputs
        if answer.finish_reason == "stop" and not params.include_stop_str_in_output:
            shown = outputs[:-1]
        if not params.detokenize:
            return
        whole = self.tokenizer.decode(outputs, params.skip_special_tokens)
        answer.text = self.tokenizer.decode(shown, params.skip_special_tokens)
        first = len(self.tokenizer.decode(outputs[: params.min_tokens]))
        found = [
            (at + len(stop), number, at, stop)
            for number, stop in enumerate(params.stop)
            if (at := whole.find(stop, max(0, first - len(stop) + 1))) >= 0
        ]
        if found:
            end, _, begin, stop = min(found)
            answer.text = whole[: end if params.include_stop_str_in_output else begin]
            answer.finish_reason, answer.stop_reason = "stop", stop


@pytest.fixture(scope="module")
def rules(tiny):
    return Rules(tiny)


MATES = [
    SamplingParams(temperature=0.8, seed=5, max_tokens=20, presence_penalty=1.0, logprobs=1),
    SamplingParams(temperature=1.0, top_k=9, seed=6, max_tokens=20, logit_bias={9: 3}),
]
"""What runs beside each case, on other prompts."""

MATE_PROMPTS = [PROMPT[::-1], PROMPT[5:] + PROMPT[:5]]


@pytest.fixture(scope="module")
def of_mates(tiny):
    with tiny.llm(max_model_len=MAX_LEN, max_num_seqs=1) as llm:
        outputs = llm.generate(MATE_PROMPTS, MATES, progress=False)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=MODES)
def mode(request, tiny):
    """A mode's name and its engine; the prompt is in the cache where there is one."""
    options = dict(max_model_len=MAX_LEN, max_logprobs=-1)
    with tiny.llm(**options | MODES[request.param]) as llm:
        if request.param == "cached":
            llm.generate([PROMPT], progress=False)
        yield request.param, llm


@pytest.mark.parametrize("case", CASES)
def test_a_field_does_what_the_rules_say(mode, rules, of_mates, case):
    name, llm = mode
    params, answer = rules.params(case), rules.answer(case)
    if "n=3" in name:  # which has to be drawn; so there is one to draw from
        drawn = dict(temperature=1.0, top_k=1) if params.is_greedy else {}
        params = replace(params, n=3, **drawn)
    prompts, asked = [MATE_PROMPTS[0], PROMPT, MATE_PROMPTS[1]], [MATES[0], params, MATES[1]]
    before = llm.engine.stats()["num_preemptions"]
    left, output, right = llm.generate(prompts, asked, progress=False)
    assert [left.outputs[0].token_ids, right.outputs[0].token_ids] == of_mates
    if "preempted" in name and len(answer.token_ids) >= 12:  # the second of two that have room
        assert llm.engine.stats()["num_preemptions"] > before
    assert len(output.outputs) == params.n
    for choice in output.outputs:
        assert choice.token_ids == answer.token_ids
        assert choice.text == answer.text
        assert (choice.finish_reason, choice.stop_reason) == (
            answer.finish_reason,
            answer.stop_reason,
        )
        check_logprobs(choice.logprobs, params.logprobs, answer.token_ids, answer.logprobs)
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        expected = rules.tiny.logits(PROMPT).double().log_softmax(-1).numpy()
        assert output.prompt_logprobs[0] is None
        entries = output.prompt_logprobs[1:]
        check_logprobs(entries, params.prompt_logprobs, PROMPT[1:], expected[:-1])
    reads_cache = not (params.skip_reading_prefix_cache or params.prompt_logprobs is not None)
    if name == "cached":
        assert output.num_cached_tokens == (32 if reads_cache else 0)  # KV-10


def check_logprobs(entries, num_top, tokens, expected):
    """SAMPLE-9: k or k + 1 entries, the token first, with ranks."""
    if num_top is None:
        assert entries is None
        return
    assert len(entries) == len(tokens)
    for entry, token, of_all in zip(entries, tokens, expected, strict=True):
        k = len(of_all) if num_top == -1 else num_top
        assert entry.token_ids[0] == token
        assert len(set(entry.token_ids.tolist())) == len(entry.token_ids)
        falling = np.argsort(-of_all, kind="stable")
        assert set(entry.token_ids.tolist()) == {token, *falling[:k].tolist()}
        np.testing.assert_allclose(entry.logprobs, of_all[entry.token_ids], atol=1e-4)
        ranks = [int((of_all > of_all[i]).sum()) + 1 for i in entry.token_ids]
        assert entry.ranks.tolist() == ranks


def test_every_field_is_in_the_matrix():
    assert {name for options in CASES.values() for name in options} | HERE == field_names()


@pytest.mark.parametrize("case", sorted(CASES.keys() - WITHOUT_EFFECT))
def test_a_case_can_be_told_from_no_case(rules, case):
    """Or the matrix would prove nothing."""
    of_letters = "allowed_token_ids" in CASES[case] and case != "letters"
    plain, answer = rules.answer("letters" if of_letters else "greedy"), rules.answer(case)
    shows_logprobs = {"logprobs", "prompt_logprobs"} & CASES[case].keys()
    assert shows_logprobs or replace(answer, logprobs=[]) != replace(plain, logprobs=[])


def test_whatever_is_greedy_gives_the_greedy_answer(rules):
    greedy = rules.answer("greedy").token_ids
    assert all(rules.answer(case).token_ids == greedy for case in WITHOUT_EFFECT)

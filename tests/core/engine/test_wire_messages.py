"""Messages survive the way, however the bytes arrive, and each front end gets its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.engine import wire
from pagedcore.errors import ConfigError, EngineDeadError, OverloadedError, RequestError
from pagedcore.request import FinishReason, RepetitionDetection, SamplingParams
from pagedcore.step import Finished, StepOutput, TokenLogprobs


@given(messages=st.lists(st.binary(max_size=40)), cuts=st.lists(st.integers(1, 30)))
def test_frames_are_the_same_however_the_stream_is_cut(messages, cuts):
    stream = b"".join(len(m).to_bytes(4, "little") + m for m in messages)
    reader, got = wire.FrameReader(), []
    for size in cuts:
        got += reader.feed(stream[:size])
        stream = stream[size:]
    assert got + reader.feed(stream) == messages


def test_a_frame_over_the_limit_is_refused_before_it_arrives():
    with pytest.raises(ValueError, match="11 bytes; 10 are allowed"):
        wire.FrameReader(10).feed(b"\x0b\0\0\0")


@st.composite
def step_outputs(draw):
    ids = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 50)), unique=True))
    request_ids = [wire.engine_id(c, i) for c, i in ids]
    tokens = [draw(st.integers(0, 2**31 - 1)) for _ in ids]
    output = StepOutput(np.array(request_ids, np.int64), np.array(tokens, np.int32))
    for request_id in request_ids:
        if draw(st.booleans()):
            output.finished.append(Finished(request_id, FinishReason.STOP, 3))
        if draw(st.booleans()):
            output.num_cached_tokens[request_id] = 16
    return output


@given(output=step_outputs())
def test_each_connection_gets_its_part_of_a_step_in_its_own_ids_and_order(output):
    parts = wire.split_by_connection(output)
    pairs = list(zip(output.request_ids.tolist(), output.tokens.tolist(), strict=True))
    for connection in (1, 2, 3):
        mine = [(i & (2**40 - 1), token) for i, token in pairs if wire.owner_of(i) == connection]
        part = parts.get(connection)
        if part is None:
            assert not mine
            continue
        ids, tokens = np.frombuffer(part.ids, np.int64), np.frombuffer(part.tokens, np.int32)
        assert list(zip(ids.tolist(), tokens.tolist(), strict=True)) == mine
        ended = [e.request_id for e in output.finished if wire.owner_of(e.request_id) == connection]
        assert [wire.engine_id(connection, e.request_id) for e in part.finished] == ended
        assert sum(map(len, (p.num_cached_tokens for p in parts.values()))) == len(
            output.num_cached_tokens
        )


def test_a_step_without_tokens_still_tells_ends_and_prompt_logprobs():
    entry = TokenLogprobs(
        np.array([1, 2], np.int32), np.array([-0.5, -1.5], np.float32), np.array([1, 2], np.int32)
    )
    output = StepOutput(
        np.empty(0, np.int64),
        np.empty(0, np.int32),
        [Finished(wire.engine_id(2, 5), FinishReason.ERROR, None, "broken")],
        prompt_logprobs={wire.engine_id(1, 4): [entry]},
    )
    parts = wire.split_by_connection(output)
    assert parts[2].finished == [Finished(5, FinishReason.ERROR, None, "broken")]
    back = wire.unpack_logprobs(parts[1].prompt_logprobs[4][0])
    assert back.logprobs.tolist() == [-0.5, -1.5]
    assert back.ranks.dtype == back.token_ids.dtype == np.int32


def test_the_largest_ids_fit_into_int64():
    largest = wire.engine_id(wire.MAX_CONNECTION, 2**40 - 1)
    assert np.array([largest], np.int64)[0] == largest == 2**63 - 1


def test_a_request_arrives_as_it_was_sent():
    params = SamplingParams(
        n=2,
        temperature=0.5,
        logit_bias={3: 1.5},
        stop=["a"],
        stop_token_ids=[4],
        seed=-1,
        repetition_detection=RepetitionDetection(4, 2),
    )
    sent = wire.Add(7, b"\1\0\0\0", params, 2, ((1, 2), (3,)), -5, "salt")
    assert wire.decode_from_client(wire.encode(sent)[4:]) == sent


@pytest.mark.parametrize(
    "error",
    [
        RequestError("bad", "top_p"),
        OverloadedError("full", "queued_reqs", 7),
        EngineDeadError("gone"),
    ],
)
def test_an_error_is_the_same_on_the_other_side(error):
    back = wire.exception_of(wire.failure_of(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", [KeyError("/secret/path"), ConfigError("not on the wire")])
def test_an_unexpected_error_tells_only_its_type(error):
    back = wire.exception_of(wire.failure_of(error))
    assert str(back) == f"the engine failed with {type(error).__name__}"


def test_a_long_error_is_cut():
    assert len(wire.failure_of(RequestError("x" * 10_000)).message) == wire.MAX_MESSAGE_CHARS

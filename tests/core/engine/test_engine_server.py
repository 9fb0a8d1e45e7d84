"""An engine behind a socket: complete, ordered, bounded, and unmoved by its front ends."""

import asyncio
import os
import random
import socket
import stat
import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedcore.engine import connections, wire
from pagedcore.engine.client import EngineClient
from pagedcore.engine.server import EngineServer
from pagedcore.errors import ConfigError, EngineDeadError, OverloadedError, RequestError
from pagedcore.request import FinishReason, SamplingParams
from pagedcore.testing.fake_engine import FakeEngine


async def collect(generation):
    """All tokens by choice, and the last chunk of each."""
    tokens, last = {}, {}
    async with generation:
        async for chunk in generation:
            tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                last[chunk.index] = chunk
    return tokens, last


def echoed(prompt, count, start=0):
    return [prompt[(start + i) % len(prompt)] for i in range(count)]


def ask(address, *messages, count=None):
    """Send over a socket of our own; return the answers until there are `count`, or the end."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(30)
        raw.connect(address)
        raw.sendall(b"".join(m if isinstance(m, bytes) else wire.encode(m) for m in messages))
        return receive(raw, count)


def receive(raw, count=None):
    reader, answers = wire.FrameReader(), []
    while count is None or len(answers) < count:
        data = raw.recv(1 << 16)
        if not data:
            break
        answers += [wire.decode_from_server(frame) for frame in reader.feed(data)]
    return answers


def add(client_id, prompt=(1, 2, 3), **params):
    data = b"".join(token.to_bytes(4, "little", signed=True) for token in prompt)
    return wire.Add(client_id, data, SamplingParams(**params), -1)


def test_thousands_of_requests_with_random_aborts_get_all_their_tokens_in_order(serve, run):
    serving = serve()
    rng = random.Random(0)

    async def one(client, number):
        prompt = [number % 512, *(rng.randrange(512) for _ in range(rng.randrange(20)))]
        count, n, patience = rng.randint(1, 60), rng.choice([1, 1, 3]), rng.choice([1, 5, 1000])
        tokens = {i: [] for i in range(n)}
        async with client.generate(prompt, SamplingParams(max_tokens=count, n=n, seed=7)) as gen:
            async for chunk in gen:
                tokens[chunk.index] += chunk.token_ids
                patience -= 1
                if patience == 0:
                    break
            else:
                assert all(len(of_choice) == count for of_choice in tokens.values())
        for index, got in tokens.items():
            assert got == echoed(prompt, len(got), start=7 + index)

    async def use(*clients):
        await asyncio.gather(*(one(clients[i % 2], i) for i in range(3000)))
        assert [client.num_inflight for client in clients] == [0, 0]

    run(use, num_clients=2)
    serving.engine.wait_for(lambda engine: not engine.live_ids)


def test_a_disconnect_aborts_all_of_that_front_end_and_nothing_else(serve, run, paused):
    engine = serve(FakeEngine(max_num_seqs=4)).engine

    async def use(leaving, staying):
        kept = staying.generate([5, 6], SamplingParams(max_tokens=50))
        left = [leaving.generate([1, 2], SamplingParams(max_tokens=50, n=2)) for _ in range(5)]
        with paused(engine):
            await asyncio.gather(kept.admitted(), *(gen.admitted() for gen in left))
            assert len(engine.live_ids) == 11  # some run, some wait
            await leaving.close()
            await asyncio.to_thread(engine.wait_for, lambda engine: len(engine.live_ids) == 1)
        tokens, last = await collect(kept)
        assert tokens[0] == echoed([5, 6], 50)
        assert last[0].finish_reason is FinishReason.LENGTH
        for gen in left:
            with pytest.raises(EngineDeadError):
                await collect(gen)

    run(use, num_clients=2)
    engine.wait_for(lambda engine: not engine.live_ids)
    assert len({wire.owner_of(i) for i in engine.aborted}) == 1


def test_leaving_a_generation_aborts_it_whether_it_runs_or_waits(serve, run, paused):
    engine = serve(FakeEngine(max_num_seqs=1)).engine

    async def use(client):
        running = client.generate([1, 2], SamplingParams(max_tokens=4000))
        waiting = client.generate([3, 4], SamplingParams(max_tokens=4000))
        with paused(engine):
            await running.admitted()
            await waiting.admitted()
            running.close()
            waiting.close()
        await asyncio.to_thread(engine.wait_for, lambda engine: not engine.live_ids)
        assert len(engine.aborted) == 2

    run(use)


def test_one_choice_can_be_stopped_while_the_others_go_on(serve, run):
    engine = serve().engine

    async def use(client):
        lengths = [0, 0]
        async with client.generate([1, 2], SamplingParams(max_tokens=500, n=2)) as gen:
            async for chunk in gen:
                lengths[chunk.index] += len(chunk.token_ids)
                gen.stop(0)
        assert lengths[1] == 500

    run(use)
    engine.wait_for(lambda engine: not engine.live_ids)


def test_a_ping_is_answered_while_a_step_runs(serve, run):
    engine = serve().engine

    async def use(client):
        engine.hold()
        gen = client.generate([1], SamplingParams(max_tokens=2))
        await gen.admitted()
        first = await client.call("ping")
        second = await client.call("ping")
        assert second["num_steps"] == first["num_steps"] == 0
        assert second["step_seconds"] >= first["step_seconds"]
        with pytest.raises(TimeoutError):  # this one needs the engine
            await client.call("stats", timeout_s=0.05)
        engine.release()
        assert (await collect(gen))[0] == {0: [1, 1]}
        assert (await client.call("stats"))["num_requests_running"] == 0

    run(use)


def test_without_work_the_engine_is_left_alone(serve, run):
    class Counting(FakeEngine):
        num_looks = 0

        @property
        def has_work(self):
            self.num_looks += 1
            return super().has_work

    engine = serve(Counting()).engine

    async def use(client):
        await collect(client.generate([1], SamplingParams(max_tokens=3)))
        await client.call("stats")
        before = engine.num_looks
        for _ in range(200):
            await client.call("ping")
        assert engine.num_looks <= before + 3
        assert engine.num_steps == 3

    run(use)


def test_a_front_end_that_does_not_read_is_dropped_and_holds_up_nobody(
    serve, run, address, monkeypatch
):
    monkeypatch.setattr(connections, "MAX_UNSENT_BYTES", 1 << 14)
    engine = serve(FakeEngine(max_model_len=1 << 20)).engine
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(address)
        for i in range(0, 64, 8):
            raw.sendall(wire.encode(add(i, n=8, max_tokens=1 << 19)))
        engine.wait_for(lambda engine: engine.num_added == 64)

        async def use(client):
            assert (await collect(client.generate([9], SamplingParams(max_tokens=100))))[0] == {
                0: [9] * 100
            }

        run(use)
        engine.wait_for(lambda engine: not engine.live_ids)
        assert len(engine.aborted) == 64


def test_a_failing_engine_ends_every_stream_with_an_error(serve, run):
    serving = serve()

    async def use(one, other):
        gens = [
            client.generate([1], SamplingParams(max_tokens=4000, n=2)) for client in (one, other)
        ]
        serving.engine.pause()
        for gen in gens:
            await gen.admitted()
        serving.engine.break_down(RuntimeError("device lost at address 0xdead"))
        for gen in gens:
            with pytest.raises(EngineDeadError, match="failed with RuntimeError") as caught:
                await asyncio.wait_for(collect(gen), 2)
            assert "0xdead" not in str(caught.value)
        assert one.dead
        with pytest.raises(EngineDeadError):
            await collect(one.generate([1], SamplingParams()))

    run(use, num_clients=2)
    serving.join()
    assert isinstance(serving.error, RuntimeError)


def test_a_failed_step_ends_only_the_sequences_in_it(serve, run):
    engine = serve().engine

    async def use(client):
        engine.pause()
        gen = client.generate([1], SamplingParams(max_tokens=4))
        await gen.admitted()
        engine.fail_running("no numbers came out")
        engine.release()
        _, last = await collect(gen)
        assert last[0].finish_reason is FinishReason.ERROR
        assert last[0].message == "no numbers came out"
        assert (await collect(client.generate([1], SamplingParams(max_tokens=4))))[0][0] == [1] * 4

    run(use)


def test_a_step_that_does_not_end_makes_the_engine_dead(serve, run):
    told = threading.Event()
    serving = serve(step_timeout_s=0.2, on_stuck=told.set)

    async def use(client):
        serving.engine.hold()
        gen = client.generate([1], SamplingParams(max_tokens=4))
        with pytest.raises(EngineDeadError, match="stuck"):
            await collect(gen)
        assert told.wait(30)
        assert client.dead

    run(use)
    serving.engine.release()
    serving.join()
    assert isinstance(serving.error, EngineDeadError)


def test_work_goes_on_with_a_new_engine_at_the_same_address(serve, run):
    first = serve()

    async def use(client):
        gen = client.generate([1], SamplingParams(max_tokens=4000))
        first.engine.pause()
        await gen.admitted()
        await asyncio.to_thread(first.stop)
        with pytest.raises(EngineDeadError, match="stopped"):
            await collect(gen)
        serve(FakeEngine(served_model_names=("new",)))
        await client.wait_ready()
        assert client.info.served_model_names == ("new",)
        assert (await collect(client.generate([1, 2], SamplingParams(max_tokens=3))))[0] == {
            0: [1, 2, 1]
        }

    run(use)


def test_log_probabilities_and_cached_tokens_arrive(serve, run):
    serve()
    prompt = list(range(40))

    async def use(client):
        params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1)
        for cached in (0, 32):
            async with client.generate(prompt, params) as gen:
                chunks = [chunk async for chunk in gen]
            assert chunks[0].num_cached_tokens == cached
            entries = [entry for chunk in chunks for entry in chunk.logprobs or []]
            assert [entry.token_ids.tolist() for entry in entries] == [[0, 1], [1, 2], [2, 3]]
            assert entries[0].ranks.tolist() == [1, 2]
            of_prompt = [entry for chunk in chunks for entry in chunk.prompt_logprobs or []]
            assert [int(entry.token_ids[0]) for entry in of_prompt] == prompt[1:]

    run(use)


def test_no_limit_on_tokens_means_up_to_the_models_length(serve, run):
    serve(FakeEngine(max_model_len=50))

    async def use(client):
        tokens, last = await collect(client.generate([1, 2], SamplingParams(max_tokens=None)))
        assert len(tokens[0]) == 48
        assert last[0].finish_reason is FinishReason.LENGTH

    run(use)


@pytest.mark.parametrize(
    ("prompt", "params", "options", "names"),
    [
        ([], {}, {}, "prompt must be"),
        ([512], {}, {}, r"prompt holds token id 512, outside 0\.\.511"),
        ([1, -1], {}, {}, "prompt holds token id -1"),
        ([1] * 4096, {}, {}, "4096 tokens"),
        ([1], {"stop_token_ids": [600]}, {}, "stop_token_ids holds token id 600"),
        ([1], {"logit_bias": {600: 1.0}}, {}, "logit_bias holds"),
        ([1], {"allowed_token_ids": [600]}, {}, "allowed_token_ids holds"),
        ([1], {"n": 20000}, {}, "n may be at most 16384"),
        ([1], {}, {"bad_words_token_ids": [[1, 600]]}, "bad_words holds token id 600"),
    ],
)
def test_what_could_end_the_engine_is_refused(serve, run, prompt, params, options, names):
    serve()

    async def use(client):
        gen = client.generate(prompt, SamplingParams(**params), **options)
        with pytest.raises(RequestError, match=names):
            await gen.admitted()
        assert client.num_inflight == 0
        assert (await collect(client.generate([7], SamplingParams(max_tokens=1))))[0] == {0: [7]}

    run(use, max_inflight=1 << 20)


def test_a_full_queue_refuses_a_request_and_all_its_choices(serve, run, paused):
    engine = serve(FakeEngine(max_num_seqs=1, max_num_queued_reqs=4)).engine

    async def use(client):
        with paused(engine):
            await client.generate([1], SamplingParams(max_tokens=4, n=4)).admitted()
            with pytest.raises(OverloadedError) as caught:
                await client.generate([1], SamplingParams(n=2)).admitted()
            assert caught.value.reason == "queued_reqs"
            assert len(engine.live_ids) == 4

    run(use)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(serve, address, paused):
    engine = serve().engine
    with paused(engine), socket.socket(socket.AF_UNIX) as raw:
        raw.connect(address)
        raw.sendall(wire.encode(add(5, n=3)) + wire.encode(add(7)))
        welcome, admitted, refused = receive(raw, 3)
        assert isinstance(welcome, wire.Welcome)
        assert admitted == wire.Admitted(5)
        assert refused.id == 7
        assert "in use" in refused.failure.message
        assert len(engine.live_ids) == 3


def test_an_engine_that_trips_over_a_request_goes_on_and_tells_no_details(serve, address, caplog):
    def trip(request):
        raise KeyError("secret")

    serve(FakeEngine(trip))
    _, refused = ask(address, add(0), count=2)
    assert refused.failure.kind == "internal"
    assert "secret" not in refused.failure.message
    assert "secret" in caplog.text
    assert isinstance(ask(address, wire.Call(1, "stats", {}), count=2)[1], wire.Reply)


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [("explode", {}, "no call 'explode'.*ping, stats"), ("stats", {"a": 1}, "takes no arguments")],
)
def test_an_unknown_call_is_answered_with_what_there_is(serve, run, name, arguments, names):
    serve()

    async def use(client):
        with pytest.raises(RequestError, match=names):
            await client.call(name, **arguments)

    run(use)


def test_a_prefix_cache_in_use_is_not_reset(serve, run, paused):
    engine = serve().engine

    async def use(client):
        assert await client.call("reset_prefix_cache") is True
        with paused(engine):
            gen = client.generate([1], SamplingParams(max_tokens=100))
            await gen.admitted()
            assert await client.call("reset_prefix_cache") is False
        await collect(gen)

    run(use)


MALFORMED = [
    b"",
    b"\xc1",
    b"\x90",
    msgspec.msgpack.encode(["add"]),
    msgspec.msgpack.encode(["add", -1, b"", {}, 0]),
    msgspec.msgpack.encode(["add", 2**40, b"\0\0\0\0", {}, 0]),
    msgspec.msgpack.encode(["add", 0, b"\0\0\0\0", {"temperature": -1.0}, 0]),
    msgspec.msgpack.encode(["add", 0, b"\0\0\0\0", {"n": "2"}, 0]),
    msgspec.msgpack.encode(["add", 0, b"\0\0\0\0", {}, 2**63]),
    msgspec.msgpack.encode(["add", 0, b"\0\0\0\0", {}, 0, [[2**40]]]),
    msgspec.msgpack.encode(["abort", ["x"]]),
    msgspec.msgpack.encode(["abort", [-(2**63)]]),
    msgspec.msgpack.encode(["call", 1, "ping", []]),
    msgspec.msgpack.encode(["welcome", 1, "", 1, {}]),
    b"\x91" * 100_000,
]


@pytest.mark.parametrize("message", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_is_answered_and_the_connection_goes_on(serve, address, message):
    serve()
    frame = len(message).to_bytes(4, "little") + message
    _, answer, pong = ask(address, frame, wire.Call(3, "ping", {}), count=3)
    assert isinstance(answer, wire.Malformed)
    assert len(answer.message) <= wire.MAX_MESSAGE_CHARS
    assert pong.id == 3


def test_a_frame_that_is_too_long_closes_the_connection(serve, address):
    serve()
    _, answer = ask(address, (wire.MAX_REQUEST_BYTES + 1).to_bytes(4, "little"), b"x" * 100)
    assert isinstance(answer, wire.Malformed)
    assert "67108864 are allowed" in answer.message


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=200))
def test_hostile_bytes_never_reach_the_engine(served, data):
    address, engine = served
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(address)
        raw.sendall(data)
    (_, pong) = ask(address, wire.Call(1, "ping", {}), count=2)
    assert pong.failure is None
    assert engine.num_added == 0


@pytest.fixture
def served(serve, address):
    return address, serve().engine


def test_prompts_and_outputs_cross_a_socket_in_pieces(serve, address):
    serve(FakeEngine(vocab_size=50_000, max_model_len=200_000))
    frame = wire.encode(add(0, tuple(range(40_000)), max_tokens=2))
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(30)
        raw.connect(address)
        for start in range(0, len(frame), 7001):
            raw.sendall(frame[start : start + 7001])
        answers = receive(raw, 4)
    tokens = b"".join(a.tokens for a in answers if isinstance(a, wire.Outputs))
    assert tokens == bytes(4) + bytes([1, 0, 0, 0])


def test_the_socket_stands_in_a_folder_of_its_owner_and_goes_with_the_server(tmp_path):
    address = str(tmp_path / "new" / "engine.sock")
    server = EngineServer(FakeEngine(), address)
    server.listen()
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
    server.stop()
    server.serve()
    assert not os.path.exists(address)


def test_a_folder_that_others_may_enter_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        EngineServer(FakeEngine(), str(tmp_path / "open" / "s")).listen()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"longer than 107 bytes.*TMPDIR"):
        EngineServer(FakeEngine(), str(tmp_path / ("x" * 107))).listen()


def test_the_socket_of_a_dead_engine_is_replaced(serve, address, run):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    serve()

    async def use(client):
        assert client.ready

    run(use)


def test_the_address_of_a_live_engine_is_refused(serve, address):
    serve()
    with pytest.raises(ConfigError, match="another engine listens"):
        EngineServer(FakeEngine(), address).listen()
    assert isinstance(ask(address, count=1)[0], wire.Welcome)


def test_a_file_at_the_address_is_left_alone(address):
    with open(address, "w") as file:
        file.write("precious")
    with pytest.raises(ConfigError, match="something else"):
        EngineServer(FakeEngine(), address).listen()
    with open(address) as file:
        assert file.read() == "precious"


def test_a_client_may_be_made_before_there_is_an_engine(serve, address):
    async def main():
        client = EngineClient(address)
        with pytest.raises(OverloadedError) as caught:
            await collect(client.generate([1], SamplingParams()))
        assert caught.value.reason == "not_ready"
        assert not client.dead
        serve()
        await client.wait_ready()
        assert (await collect(client.generate([1], SamplingParams(max_tokens=1))))[0] == {0: [1]}
        await client.close()

    asyncio.run(main())


def test_a_step_is_one_message_for_each_front_end(serve, address):  # D26
    engine = serve(FakeEngine()).engine
    engine.pause()
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for link in (first, second):
            link.settimeout(30)
            link.connect(address)
            link.sendall(b"".join(wire.encode(add(i, max_tokens=9)) for i in range(32)))
        engine.wait_for(lambda engine: len(engine.live_ids) == 64)
        engine.advance(3)
        for link in (first, second):
            answers = receive(link, 1 + 32 + 3)  # the welcome, and each admission
            steps = [message for message in answers if isinstance(message, wire.Outputs)]
            assert [len(step.tokens) // 4 for step in steps] == [32, 32, 32]

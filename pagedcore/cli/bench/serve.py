"""`pagedcore bench serve`: latencies of a running server, under requests that arrive over time."""

import asyncio
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pagedcore.cli.bench.client import Outcome, Server, ServerError
from pagedcore.cli.bench.load import RandomRequest, arrival_times, random_requests
from pagedcore.cli.bench.metrics import (
    METRICS,
    details,
    parse_goals,
    parse_metrics,
    parse_percentiles,
    summary,
)
from pagedcore.cli.bench.report import progress, save, show
from pagedcore.cli.flags import command, parameters, take
from pagedcore.errors import ConfigError

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    backend: Literal["openai", "openai-chat"] = "openai"
    """Completions of token ids, or chat completions of random words, which are longer in tokens."""

    base_url: str | None = None
    """Where the server is, in place of host and port; https is possible."""

    host: str = "127.0.0.1"
    """Host of the server."""

    port: int = 8000
    """Port of the server."""

    endpoint: str | None = None
    """Path to ask; by default that of the backend."""

    model: str | None = None
    """Model to ask for; by default the first that the server lists."""

    num_prompts: int = 1000
    """Requests."""

    random_input_len: int = 1024
    """Tokens of a prompt, before `random_range_ratio`."""

    random_output_len: int = 128
    """Tokens of an answer, before `random_range_ratio`."""

    random_range_ratio: float = 0.0
    """Lengths vary by up to this share, in [0, 1)."""

    random_prefix_len: int = 0
    """Tokens that all prompts begin with, on top of their own."""

    random_vocab_size: int = 10000
    """Prompts are made of token ids below this."""

    request_rate: float = math.inf
    """Requests per second; `inf` sends all at once."""

    burstiness: float = 1.0
    """1 is a Poisson process, below is burstier, above more even."""

    max_concurrency: int | None = None
    """Most requests at the same time; others wait, so that the rate may not be reached."""

    num_warmups: int = 1
    """Requests that are sent first and not counted."""

    seed: int = 0
    """Seeds prompts, lengths and arrivals."""

    temperature: float = 0.0
    """Of each request."""

    ignore_eos: bool = True
    """Ask for answers of exactly the length that was drawn."""

    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Metrics to report, separated by commas."""

    metric_percentiles: str = "50,90,99"
    """Percentiles to report, separated by commas."""

    goodput: tuple[str, ...] = ()
    """Limit in milliseconds, such as `ttft:500`: requests that keep all limits are good."""

    save_result: bool = False
    """Write the result as JSON."""

    save_detailed: bool = False
    """Write the numbers of each request, too."""

    result_dir: str = "."
    """Folder of the result."""

    result_filename: str | None = None
    """File name of the result; by default made of backend, rate, model and time."""

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, not {self.max_concurrency}")
        if self.num_warmups < 0:
            raise ConfigError(f"num_warmups must not be negative, not {self.num_warmups}")
        parse_metrics(self.percentile_metrics)
        parse_percentiles(self.metric_percentiles)
        parse_goals(self.goodput)

    @property
    def url(self) -> str:
        """Where the server is."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")


@command(parameters(Benchmark))
def serve(**options: Any) -> int:
    """Measure latencies of a running server, under requests that arrive over time.

    Definitions are those of vLLM's `bench serve`. The key is that of OPENAI_API_KEY.
    """
    wanted = Benchmark(**take(options, Benchmark))
    requests = random_requests(
        wanted.num_prompts,
        input_len=wanted.random_input_len,
        output_len=wanted.random_output_len,
        range_ratio=wanted.random_range_ratio,
        prefix_len=wanted.random_prefix_len,
        vocab_size=wanted.random_vocab_size,
        seed=wanted.seed,
    )
    times = arrival_times(
        wanted.num_prompts,
        request_rate=wanted.request_rate,
        burstiness=wanted.burstiness,
        seed=wanted.seed,
    )
    model, outcomes, duration = asyncio.run(_measure(wanted, requests, times))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) == len(outcomes):
        raise ConfigError(f"no request was answered; the first failed with {failed[0].error}")
    result = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": wanted.backend,
        "model_id": model,
        "num_prompts": wanted.num_prompts,
        "request_rate": "inf" if math.isinf(wanted.request_rate) else wanted.request_rate,
        "burstiness": wanted.burstiness,
        "max_concurrency": wanted.max_concurrency,
        **summary(
            outcomes,
            duration,
            metrics=parse_metrics(wanted.percentile_metrics),
            wanted=parse_percentiles(wanted.metric_percentiles),
            goals=parse_goals(wanted.goodput),
        ),
    }
    _show(result, wanted, failed)
    if wanted.save_result or wanted.save_detailed:
        if wanted.save_detailed:
            result |= details(outcomes)
        save(_path(wanted, result), result)
    return 1 if failed else 0


async def _measure(
    wanted: Benchmark, requests: Sequence[RandomRequest], times: Sequence[float]
) -> tuple[str, list[Outcome], float]:
    """Send the requests when their time has come: the model, outcomes, and seconds of it all."""
    server = Server(wanted.url, os.environ.get("OPENAI_API_KEY"))
    try:
        model = wanted.model or await server.model()
    except (OSError, ServerError) as error:
        raise ConfigError(f"cannot ask {wanted.url} for its models: {error}") from None
    path = wanted.endpoint or PATHS[wanted.backend]
    for request in requests[: wanted.num_warmups]:
        outcome = await server.stream(path, _request_body(request, model, wanted))
        if outcome.error is not None:
            raise ConfigError(f"the first request to {wanted.url} failed: {outcome.error}")
    limit = asyncio.Semaphore(wanted.max_concurrency) if wanted.max_concurrency else nullcontext()
    with progress() as bar:
        task = bar.add_task("requests", total=len(requests))

        async def send(request: RandomRequest) -> Outcome:
            body = _request_body(request, model, wanted)
            async with limit:
                outcome = await server.stream(path, body)
            bar.advance(task)
            return outcome

        started = time.perf_counter()
        running = []
        for request, due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            running.append(asyncio.create_task(send(request)))
        outcomes = await asyncio.gather(*running)
        return model, outcomes, time.perf_counter() - started


def _request_body(request: RandomRequest, model: str, wanted: Benchmark) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_len,
        "temperature": wanted.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wanted.ignore_eos:
        body["ignore_eos"] = True
    if wanted.backend == "openai":
        return {**body, "prompt": request.prompt_token_ids}
    words = " ".join(f"w{token}" for token in request.prompt_token_ids)
    return {**body, "messages": [{"role": "user", "content": words}]}


def _show(result: Mapping[str, Any], wanted: Benchmark, failed: Sequence[Outcome]) -> None:
    rows = {
        "answered": result["completed"],
        "failed": result["failed"],
        "seconds": result["duration"],
        "prompt tokens": result["total_input_tokens"],
        "answer tokens": result["total_output_tokens"],
        "requests/s": result["request_throughput"],
        "answer tokens/s": result["output_throughput"],
        "tokens/s, prompts and answers": result["total_token_throughput"],
    }
    if "request_goodput" in result:
        rows["good requests/s"] = result["request_goodput"]
    show(f"{result['model_id']} at {wanted.url}", rows)
    for name in parse_metrics(wanted.percentile_metrics):
        ending = f"_{name}_ms"
        found = {key.removesuffix(ending): v for key, v in result.items() if key.endswith(ending)}
        if found:
            show(f"{METRICS[name]}, {name.upper()} (ms)", found)
    if failed:
        show("First failure", {"error": str(failed[0].error)})


def _path(wanted: Benchmark, result: Mapping[str, Any]) -> Path:
    name = wanted.result_filename
    if name is None:
        model = str(result["model_id"]).split("/")[-1]
        name = f"{wanted.backend}-{result['request_rate']}qps-{model}-{result['date']}.json"
    return Path(wanted.result_dir, name)

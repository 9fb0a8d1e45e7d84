"""`pagedcore bench serve`: latencies of a running server, under requests that arrive over time."""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pagedcore.cli.bench.client import Outcome, Server
from pagedcore.cli.bench.datasets import Dataset, take_dataset
from pagedcore.cli.bench.drive import Sending, drive, wait_for_model
from pagedcore.cli.bench.load import RampUp, arrival_times
from pagedcore.cli.bench.metrics import (
    METRICS,
    details,
    parse_goals,
    parse_metadata,
    parse_metrics,
    parse_percentiles,
    summary,
)
from pagedcore.cli.bench.report import drawable, save, show, show_table
from pagedcore.cli.bench.sharegpt import TokenCounter
from pagedcore.cli.bench.synthetic import Ask
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

    request_rate: float = math.inf
    """Requests per second; `inf` sends all at once."""

    burstiness: float = 1.0
    """1 is a Poisson process, below is burstier, above more even."""

    ramp_up_strategy: Literal["linear", "exponential"] | None = None
    """Let the rate grow, or fall, over the requests, in place of `request_rate`."""

    ramp_up_start_rps: float | None = None
    """Requests per second at first."""

    ramp_up_end_rps: float | None = None
    """Requests per second at last."""

    max_concurrency: int | None = None
    """Most requests at the same time; others wait, so that the rate may not be reached."""

    num_warmups: int = 1
    """Requests that are sent first and not counted."""

    ready_check_timeout_sec: float = 0.0
    """Seconds to wait for a server that is not there yet."""

    seed: int = 0
    """Seeds prompts, lengths and arrivals."""

    temperature: float = 0.0
    """Of each request."""

    ignore_eos: bool = True
    """Ask for answers of exactly the length that was drawn."""

    extra_body: Mapping[str, Any] | None = None
    """Fields of each request, as a JSON object, such as `{"top_p": 0.9}`."""

    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Metrics to report, separated by commas."""

    metric_percentiles: str = "50,90,99"
    """Percentiles to report, separated by commas."""

    goodput: tuple[str, ...] = ()
    """Limits in milliseconds, such as `ttft:500 tpot:50`: requests that keep all are good."""

    label: str | None = None
    """A name for the result, in it and in its file's name."""

    metadata: tuple[str, ...] = ()
    """Facts for the result, such as `gpu=H200 run=3`."""

    save_result: bool = False
    """Write the result as JSON."""

    save_detailed: bool = False
    """Write the numbers of each request, too."""

    result_dir: str = "."
    """Folder of the result."""

    result_filename: str | None = None
    """File name of the result; by default made of backend or label, rate, model and time."""

    plot: str | None = None
    """File for a chart (PNG): latencies by percentile, and what happened over time."""

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, not {self.max_concurrency}")
        if self.num_warmups < 0:
            raise ConfigError(f"num_warmups must not be negative, not {self.num_warmups}")
        if not 0 <= self.ready_check_timeout_sec < math.inf:
            raise ConfigError("ready_check_timeout_sec must be a number of seconds, or 0")
        if self.plot is not None:
            drawable(self.plot)
        _ = self.ramp_up
        parse_metadata(self.metadata)
        parse_metrics(self.percentile_metrics)
        parse_percentiles(self.metric_percentiles)
        parse_goals(self.goodput)

    @property
    def url(self) -> str:
        """Where the server is."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def ramp_up(self) -> RampUp | None:
        """How the rate changes; raises ConfigError for settings that do not go together."""
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy is None:
            if start is not None or end is not None:
                raise ConfigError("ramp_up_start_rps and ramp_up_end_rps need ramp_up_strategy")
            return None
        if start is None or end is None:
            raise ConfigError("ramp_up_strategy needs ramp_up_start_rps and ramp_up_end_rps")
        if not math.isinf(self.request_rate):
            raise ConfigError("ramp_up_strategy takes the place of request_rate: leave one out")
        return RampUp(self.ramp_up_strategy, start, end)


@command([*parameters(Dataset), *parameters(Benchmark, listed={"goodput", "metadata"})])
def serve(**options: Any) -> int:
    """Measure latencies of a running server, under requests that arrive over time.

    Definitions are those of vLLM's `bench serve`. The key is that of OPENAI_API_KEY.
    """
    wanted, dataset = Benchmark(**take(options, Benchmark)), take_dataset(options)
    times = arrival_times(
        dataset.num_prompts,
        request_rate=wanted.request_rate,
        burstiness=wanted.burstiness,
        seed=wanted.seed,
        ramp_up=wanted.ramp_up,
    )
    server = Server(wanted.url, os.environ.get("OPENAI_API_KEY"))
    model = wanted.model
    if model is None or wanted.ready_check_timeout_sec:
        listed = asyncio.run(wait_for_model(server, wanted.ready_check_timeout_sec))
        model = model or listed
    requests = dataset.requests(
        seed=wanted.seed,
        vocab_size=dataset.random_vocab_size,
        count_tokens=TokenCounter(dataset.tokenizer or model),
    )
    sendings = [
        Sending(_request_body(request, model, wanted), due)
        for request, due in zip(requests, times, strict=True)
    ]
    path = wanted.endpoint or PATHS[wanted.backend]
    outcomes, duration = asyncio.run(
        drive(server, path, sendings, num_warmups=wanted.num_warmups, most=wanted.max_concurrency)
    )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) == len(outcomes):
        raise ConfigError(f"no request was answered; the first failed with {failed[0].error}")
    result = _describe(wanted, dataset, model) | summary(
        outcomes,
        duration,
        metrics=parse_metrics(wanted.percentile_metrics),
        wanted=parse_percentiles(wanted.metric_percentiles),
        goals=parse_goals(wanted.goodput),
    )
    _show(result, wanted, failed)
    if wanted.save_result or wanted.save_detailed:
        numbers = details(outcomes) if wanted.save_detailed else {}
        save(_path(wanted, result), {**result, **numbers})
    if wanted.plot:
        from pagedcore.cli.bench.plot import draw_serve

        title = f"{model}: {dataset.num_prompts} requests, {_rate(wanted)}"
        draw_serve(Path(wanted.plot), title, outcomes)
    return 1 if failed else 0


def _rate(wanted: Benchmark) -> str:
    """How requests come, in words."""
    if wanted.ramp_up is not None:
        return f"{wanted.ramp_up.start:g} to {wanted.ramp_up.end:g} per second"
    if math.isinf(wanted.request_rate):
        return "all at once"
    return f"{wanted.request_rate:g} per second"


def _describe(wanted: Benchmark, dataset: Dataset, model: str) -> dict[str, Any]:
    """What was asked for, with the names of vLLM's result."""
    facts: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": wanted.backend,
        "backend": wanted.backend,
        "label": wanted.label,
        "model_id": model,
        "tokenizer_id": dataset.tokenizer or model,
        "dataset_name": dataset.dataset_name,
        "num_prompts": dataset.num_prompts,
        **parse_metadata(wanted.metadata),
        "request_rate": "inf" if math.isinf(wanted.request_rate) else wanted.request_rate,
        "burstiness": wanted.burstiness,
        "max_concurrency": wanted.max_concurrency,
    }
    if wanted.ramp_up_strategy is not None:
        names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        facts |= {name: getattr(wanted, name) for name in names}
    return facts


def _request_body(request: Ask, model: str, wanted: Benchmark) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_len,
        "temperature": wanted.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wanted.ignore_eos:
        body["ignore_eos"] = True
    body |= wanted.extra_body or {}
    prompt = request.prompt
    if wanted.backend == "openai":
        return {**body, "prompt": prompt}
    text = prompt if isinstance(prompt, str) else " ".join(f"w{token}" for token in prompt)
    return {**body, "messages": [{"role": "user", "content": text}]}


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
        "answer tokens/s, best second": result["max_output_tokens_per_s"],
        "requests at once, most": result["max_concurrent_requests"],
    }
    if result["request_goodput"] is not None:
        rows["good requests/s"] = result["request_goodput"]
    show(f"{result['model_id']} at {wanted.url}", rows)
    metrics = [m for m in parse_metrics(wanted.percentile_metrics) if f"mean_{m}_ms" in result]
    percentiles = [f"p{p:g}" for p in parse_percentiles(wanted.metric_percentiles)]
    columns = ["mean", "median", "std", *percentiles]
    latencies = [
        [f"{name.upper()}: {METRICS[name]}", *(f"{result[f'{c}_{name}_ms']:,.2f}" for c in columns)]
        for name in metrics
    ]
    show_table("Latency", ["ms", *columns], latencies)
    if failed:
        show("First failure", {"error": str(failed[0].error)})


def _path(wanted: Benchmark, result: Mapping[str, Any]) -> Path:
    name = wanted.result_filename
    if name is None:
        model = str(result["model_id"]).split("/")[-1]
        most = "" if wanted.max_concurrency is None else f"-concurrency{wanted.max_concurrency}"
        kind, rate = wanted.label or wanted.backend, f"{result['request_rate']}qps{most}"
        name = f"{kind}-{rate}-{model}-{result['date']}.json"
    return Path(wanted.result_dir, name)

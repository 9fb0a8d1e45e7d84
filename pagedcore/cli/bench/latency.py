"""`pagedcore bench latency`: one batch at a time, in this process."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.cli.bench.report import PERCENTILES, drawable, percentiles, progress, save, show
from pagedcore.cli.bench.synthetic import random_requests
from pagedcore.cli.flags import command, engine_parameters, parameters, take
from pagedcore.config import DEFAULT_MODEL
from pagedcore.errors import ConfigError
from pagedcore.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    input_len: int = 32
    """Tokens of each prompt."""

    output_len: int = 128
    """Tokens of each answer."""

    batch_size: int = 8
    """Prompts that run together."""

    n: int = 1
    """Answers per prompt."""

    num_iters_warmup: int = 10
    """Batches that are run first and not counted."""

    num_iters: int = 30
    """Batches that are counted."""

    disable_detokenize: bool = False
    """Leave out making text."""

    output_json: str | None = None
    """File for the result."""

    plot: str | None = None
    """File for a chart (PNG) of the seconds of each batch."""

    def __post_init__(self) -> None:
        if self.plot is not None:
            drawable(self.plot)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.num_iters < 1 or self.num_iters_warmup < 0:
            raise ConfigError("num_iters must be at least 1 and num_iters_warmup not negative")


@command([*parameters(Benchmark), *engine_parameters()])
def latency(model: str = DEFAULT_MODEL, **options: Any) -> int:
    """Measure the seconds that one batch takes, from its start to its last token.

    The prefix cache is off unless `--enable-prefix-caching` says otherwise.
    """
    wanted = Benchmark(**take(options, Benchmark))
    options.setdefault("enable_prefix_caching", False)
    from pagedcore import LLM

    with LLM(model, **options) as llm:
        requests = random_requests(
            wanted.batch_size,
            input_len=wanted.input_len,
            output_len=wanted.output_len,
            range_ratio=0.0,
            prefix_len=0,
            vocab_size=llm.engine.info.vocab_size,
            seed=options.get("seed", 0),
        )
        params = SamplingParams(
            n=wanted.n,
            max_tokens=wanted.output_len,
            ignore_eos=True,
            detokenize=not wanted.disable_detokenize,
        )
        prompts = [request.prompt for request in requests]
        latencies = []
        with progress() as bar:
            total = wanted.num_iters_warmup + wanted.num_iters
            for _ in bar.track(range(total), description="batches"):
                started = time.perf_counter()
                llm.generate(prompts, params, progress=False)
                latencies.append(time.perf_counter() - started)
    counted = latencies[wanted.num_iters_warmup :]
    result = {
        "avg_latency": sum(counted) / len(counted),
        "latencies": counted,
        "percentiles": percentiles(counted, PERCENTILES),
    }
    rows = {"average (s)": result["avg_latency"]}
    rows |= {f"p{p} (s)": value for p, value in result["percentiles"].items()}  # type: ignore[attr-defined]
    show("Latency of a batch", rows)  # type: ignore[arg-type]
    if wanted.output_json:
        save(Path(wanted.output_json), result)
    if wanted.plot:
        from pagedcore.cli.bench.plot import draw_latency

        title = f"{model}: {wanted.batch_size} x {wanted.input_len} in, {wanted.output_len} out"
        draw_latency(Path(wanted.plot), title, counted)
    return 0

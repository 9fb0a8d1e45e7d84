"""`pagedcore bench throughput`: all prompts at once, in this process."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.cli.bench.datasets import Dataset, take_dataset
from pagedcore.cli.bench.report import save, show
from pagedcore.cli.flags import command, engine_parameters, parameters, take
from pagedcore.config import DEFAULT_MODEL
from pagedcore.errors import ConfigError
from pagedcore.request import SamplingParams

_NOT_HERE = ("tokenizer", "random_vocab_size")
"""The model in this process knows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    prefix_len: int | None = None
    """The same as `random_prefix_len`."""

    n: int = 1
    """Answers per prompt."""

    disable_detokenize: bool = False
    """Leave out making text."""

    output_json: str | None = None
    """File for the result."""


@command([*parameters(Dataset, skip=_NOT_HERE), *parameters(Benchmark), *engine_parameters()])
def throughput(model: str = DEFAULT_MODEL, **options: Any) -> int:
    """Measure requests and tokens per second when all prompts are there at once."""
    wanted = Benchmark(**take(options, Benchmark))
    if wanted.prefix_len is not None:
        if "random_prefix_len" in options:
            raise ConfigError("prefix_len and random_prefix_len are the same: leave one out")
        options["random_prefix_len"] = wanted.prefix_len
    dataset = take_dataset(options, skip=_NOT_HERE)
    from pagedcore import LLM

    with LLM(model, **options) as llm:
        requests = dataset.requests(
            seed=options.get("seed", 0),
            vocab_size=llm.engine.info.vocab_size,
            count_tokens=lambda text: len(llm.tokenizer.encode(text)),
        )
        params = [
            SamplingParams(
                n=wanted.n,
                max_tokens=request.output_len,
                ignore_eos=True,
                detokenize=not wanted.disable_detokenize,
            )
            for request in requests
        ]
        started = time.perf_counter()
        outputs = llm.generate([request.prompt for request in requests], params)
        elapsed = time.perf_counter() - started
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    result = {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (num_input + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }
    rows = {
        "requests/s": result["requests_per_second"],
        "tokens/s, prompts and answers": result["tokens_per_second"],
        "tokens/s, answers": result["output_tokens_per_second"],
        "prompt tokens": num_input,
        "answer tokens": num_output,
        "seconds": elapsed,
    }
    show("Throughput", rows)
    if wanted.output_json:
        save(Path(wanted.output_json), result)
    return 0

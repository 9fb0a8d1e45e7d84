"""`pagedcore bench throughput`: all prompts at once, in this process."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.cli.bench.load import random_requests
from pagedcore.cli.bench.report import save, show
from pagedcore.cli.flags import command, engine_parameters, parameters, take
from pagedcore.config import DEFAULT_MODEL
from pagedcore.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    input_len: int = 1024
    """Tokens of a prompt, before `random_range_ratio`."""

    output_len: int = 128
    """Tokens of an answer, before `random_range_ratio`."""

    num_prompts: int = 1000
    """Requests."""

    random_range_ratio: float = 0.0
    """Lengths vary by up to this share, in [0, 1)."""

    prefix_len: int = 0
    """Tokens that all prompts begin with, on top of their own."""

    n: int = 1
    """Answers per prompt."""

    disable_detokenize: bool = False
    """Leave out making text."""

    output_json: str | None = None
    """File for the result."""


@command([*parameters(Benchmark), *engine_parameters()])
def throughput(model: str = DEFAULT_MODEL, **options: Any) -> int:
    """Measure requests and tokens per second when all prompts are there at once."""
    wanted = Benchmark(**take(options, Benchmark))
    from pagedcore import LLM

    with LLM(model, **options) as llm:
        requests = random_requests(
            wanted.num_prompts,
            input_len=wanted.input_len,
            output_len=wanted.output_len,
            range_ratio=wanted.random_range_ratio,
            prefix_len=wanted.prefix_len,
            vocab_size=llm.engine.info.vocab_size,
            seed=options.get("seed", 0),
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
        outputs = llm.generate([request.prompt_token_ids for request in requests], params)
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

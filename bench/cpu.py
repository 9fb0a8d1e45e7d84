"""pagedcore beside transformers.generate on one CPU: tokens per second of both, and their ratio.

    python bench/cpu.py [--random] [--repeats 5] [--out bench/results/cpu.json]
    python bench/cpu.py --quantization ["gguf FILE" ...] [--out bench/results/cpu-packed.json]

SmolLM2-135M in bfloat16. b1, b8 and b32 are that many prompts of 32 tokens with 64 greedy output
tokens each, end of sequence ignored, all output tokens over the whole time; prefill is 8 prompts of
512 tokens, prompt tokens per second. Both sides take turns in one process, with the same threads,
weights and prompts. `--random` takes random weights of the same shape: nothing is downloaded.
`--quantization` takes formats of `formats.py`, by default some of 4 and of 8 bits, and compares
each with our own bfloat16 instead, the two in turn.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import machine
import numpy as np
import torch
from formats import options_for

from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.engine.engine import Engine
from pagedcore.request import Request

SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_type="default", rope_theta=100000.0),
    tie_word_embeddings=True,
)

PACKED = {
    "gguf FILE": 4,
    "gguf Q4_0": 4,
    "gguf Q4_K": 5,
    "gptq 4": 4,
    "gguf Q8_0": 8,
    "gptq 8": 8,
    "int8 w8a8": 8,
}
"""Formats that are compared with bfloat16 by default, and the bits of their layers: rows of 576 are
in Q5_0 where others are in Q4_K."""

Prompts = list[list[int]]
Side = Callable[[Prompts, int], list[list[int]]]
"""Prompts and a number of tokens to the tokens that follow each prompt."""


@dataclass(frozen=True)
class Case:
    """One line of the table; gate and goal are ratios to the peer.

    `packed` are those of formats of 4 bits to bfloat16; of all others, both are 1.
    """

    name: str
    num_prompts: int
    prompt_length: int
    num_tokens: int
    gate: float
    goal: float
    packed: tuple[float, float] = (1.0, 1.0)

    @property
    def counted(self) -> int:
        """Tokens that the rate counts: of the outputs, or in prefill of the prompts."""
        return self.num_prompts * (self.num_tokens if self.num_tokens > 1 else self.prompt_length)


CASES = (
    Case("b1", 1, 32, 64, 3.0, 4.0, packed=(1.5, 2.0)),
    Case("b8", 8, 32, 64, 3.0, 4.0),
    Case("b32", 32, 32, 64, 2.0, 3.0),
    Case("prefill", 8, 512, 1, 1.0, 1.25),
)


def ours(engine: Engine) -> Side:
    numbers = iter(range(1 << 62))

    def generate(prompts: Prompts, num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        tokens: dict[int, list[int]] = {}
        for prompt in prompts:
            number = next(numbers)
            tokens[number] = []
            ids = np.asarray(prompt, np.int32)
            engine.add(Request(id=number, prompt_token_ids=ids, params=params))
        while engine.has_work:
            output = engine.step()
            if output is not None:
                for number, token in zip(
                    output.request_ids.tolist(), output.tokens.tolist(), strict=True
                ):
                    tokens[number].append(token)
        return list(tokens.values())

    return generate


def peer(folder: str) -> Side:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: Prompts, num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )
        return out[:, ids.shape[1] :].tolist()

    return generate


def measure(
    case: Case, sides: dict[str, Side], repeats: int, gate: float, goal: float
) -> dict[str, object]:
    """Rates of both sides, taken in turn, and how far their tokens agree."""
    random = np.random.default_rng(0)
    high = SHAPE["vocab_size"]
    prompts = random.integers(100, high, (case.num_prompts, case.prompt_length)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[list[int]]] = {}
    for side in sides.values():
        side(prompts, min(case.num_tokens, 8))
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            tokens[name] = side(prompts, case.num_tokens)
            rates[name].append(case.counted / (time.perf_counter() - started))
            lengths = [len(row) for row in tokens[name]]
            wanted = [case.num_tokens] * case.num_prompts
            assert lengths == wanted, f"{case.name}: {name} gave {lengths} tokens, not {wanted}"
    ours, theirs = (np.array(tokens[name]) for name in sides)
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {
        **{name: statistics.median(samples) for name, samples in rates.items()},
        "ratio": statistics.median(ratios),
        "gate": gate,
        "goal": goal,
        "ratios": ratios,
        "samples": rates,
        "same_first_tokens": float((ours[:, 0] == theirs[:, 0]).mean()),
        "same_tokens": float((ours == theirs).mean()),
    }


def verdict(figures: dict[str, object]) -> str:
    for name in ("goal", "gate"):
        if figures["ratio"] >= figures[name]:  # type: ignore[operator]
            return f"{name} met"
    return "gate MISSED"


def start(**options: str) -> Engine:
    return build_engine(
        EngineConfig.from_options(
            **options,
            device="cpu",
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=32,
            enable_prefix_caching=False,
        )
    )


def write_random_model(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(folder)


def compare(
    args: argparse.Namespace, sides: dict[str, Side], bars: Callable[[Case], tuple[float, float]]
) -> dict[str, object]:
    """The chosen cases; `bars` are each one's gate and goal."""
    first, second = sides
    print(f"{'':9}{first:>14}{second:>14}{'ratio':>8}{'gate':>7}{'goal':>7}")
    figures = {}
    for case in CASES:
        if case.name not in args.cases:
            continue
        gate, goal = bars(case)
        found = figures[case.name] = measure(case, sides, args.repeats, gate, goal)
        print(
            f"{case.name:9}{found[first]:14,.1f}{found[second]:14,.1f}"
            f"{found['ratio']:7.2f}x{gate:6.2f}x{goal:6.2f}x  {verdict(found)}",
            flush=True,
        )
    return figures


def compare_formats(args: argparse.Namespace, engine: Engine, model: str) -> dict[str, object]:
    """Each format beside `engine`, which runs the model in bfloat16."""
    formats = {}
    for name in args.quantization or PACKED:
        with options_for(name, model) as options:
            other = start(**options)
        has_4_bits = PACKED.get(name, 4) == 4
        sides = {name: ours(other), "bfloat16": ours(engine)}
        formats[name] = compare(args, sides, lambda c, b=has_4_bits: c.packed if b else (1.0, 1.0))
        other.shutdown()
    return formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="another model of this shape")
    parser.add_argument(
        "--quantization", nargs="*", help="formats of formats.py, beside our bfloat16"
    )
    parser.add_argument("--random", action="store_true", help="random weights, no download")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="by default cpu.json or cpu-packed.json in bench/results")
    args = parser.parse_args()
    load_average = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            write_random_model(folder)
        model = folder if args.random else args.model
        engine = start(model=model)
        if args.quantization is None:
            sides = {"pagedcore": ours(engine), "transformers": peer(engine.info.model)}
            figures = {"cases": compare(args, sides, lambda case: (case.gate, case.goal))}
        else:
            figures = {"formats": compare_formats(args, engine, model)}
        startup = engine.info.startup_seconds
        engine.shutdown()
    name = "cpu.json" if args.quantization is None else "cpu-packed.json"
    machine.write_result(
        args.out or str(machine.RESULTS / name),
        arguments={key: value for key, value in vars(args).items() if key != "out"},
        threads=torch.get_num_threads(),
        load_average=load_average,
        startup_seconds=startup,
        **figures,
    )


if __name__ == "__main__":
    main()

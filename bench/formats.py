"""A small model in every weight format: its size, its speed for one token, and what it answers.

    python bench/formats.py [--formats "gptq 4" awq ...] [--out bench/results/formats.json]

Each is asked for the capital of France in two ways, and reads some texts. The status is 1 unless
Paris is in every answer to the longer question. In the shorter one, the model's own first token is
a tie (`The` 0.155, `L` 0.140 in float32), which any rounding may turn over, be it of 8 bits: its
answer is written down, and says little. The perplexity says most.

The model's matrices are rounded to the nearest, by the same writers that the tests use, and what is
written is read as any checkpoint is. Its own come from blocks of Q4_1: what rounds runs of 32 to
steps from their least number to their largest finds the same numbers again. Beside the formats of
the tests there are

    bfloat16              the model itself: what all others are made from
    fp8 while loading     --quantization fp8
    gguf FILE, gguf Q...  the model's own file with its blocks kept, and others of one type each;
                          where rows are no whole blocks of that type, of the one that llama.cpp
                          takes instead
    quantize F            what `pagedcore quantize --format F` writes, and the same with scales
                          from a calibration text
    kv F                  keys and values in the cache's format F, weights in bfloat16

MXFP4 is not among them: it stores experts, and this model has none. Sizes are megabytes of the
file, and of weights in memory by `pagedcore plan`, of which embeddings in bfloat16 are 57. Speeds
are of one run, and mean something where nothing else runs (`load_average` in the file).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import machine
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pagedcore import LLM, SamplingParams
from pagedcore.config import EngineConfig
from pagedcore.execution.planning import plan_engine
from pagedcore.plugins import collect, load_plugins
from pagedcore.sources import find_model
from pagedcore.testing.written_blocks import GGUF_KINDS, gguf_matrix
from pagedcore.testing.written_formats import WRITTEN

SHORT = "What is the capital of France?"
QUESTION = f"{SHORT} Answer in one sentence."
NUM_TOKENS = 32
TEXT_TOKENS = 512
SLOW_TOKENS = 8
"""Where each takes a second: float8 on a CPU."""

INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes for rows that are no whole number of 256."""

GROUP_SIZE = 32
"""Of what `pagedcore quantize` writes: rows of this model have 576 inputs."""

QUANTIZE = ("int8", "gptq", "gptq 8", "awq", "fp8")
CALIBRATED = ("int8", "gptq", "awq")
CACHES = ("fp8", "int8")
"""Formats of keys and values beside the model's own."""

ROOT = Path(__file__).parents[1]
CALIBRATION = ROOT / "docs" / "performance.md"
READ = [ROOT / name for name in ("LICENSE", "README.md", "docs/serving.md", "docs/plugins.md")]
"""Texts whose perplexity is told: one alone says little of small differences."""

Write = Callable[[Path, Path], None]


def source_folder(model: str) -> Path:
    """The folder of a model in 16 bits."""
    return find_model(model, collect(load_plugins(()), "pagedcore_sources"))


def copy_with(
    source: Path, target: Path, store: Callable[[str, Tensor], dict[str, Tensor]]
) -> dict[str, object]:
    """Copy a model with the matrices of its layers stored otherwise; returns its config."""
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            layer = name.removesuffix(".weight")
            if not layer.endswith("_proj"):
                tensors[name] = tensor
                continue
            stored = store(layer, tensor.float())
            tensors |= {f"{layer}.{what}": value for what, value in stored.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in (*source.glob("*.json"), *source.glob("*.jinja")):
        if path.name != "config.json" and "index" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    return json.loads((source / "config.json").read_text(encoding="utf-8"))


def finish(target: Path, config: dict[str, object], settings: dict[str, object]) -> None:
    config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def written(name: str) -> Write:
    """A format of WRITTEN."""

    def write(source: Path, target: Path) -> None:
        form = WRITTEN[name]
        config = copy_with(source, target, lambda layer, weight: form.write(weight)[0])
        finish(target, config, dict(form.config))

    return write


def blocks(name: str) -> Write:
    """A type of GGUF blocks."""

    def write(source: Path, target: Path) -> None:
        types = {}

        def store(layer: str, weight: Tensor) -> dict[str, Tensor]:
            fits = weight.shape[1] % GGUF_KINDS[name][0] == 0
            types[layer] = name if fits else INSTEAD[name]
            return {"weight": gguf_matrix(types[layer], weight)[0]}

        config = copy_with(source, target, store)
        finish(target, config, {"quant_method": "gguf", "types": types})

    return write


def quantized(name: str, *, calibrated: bool = False) -> Write:
    """What `pagedcore quantize` writes."""
    form, _, bits = name.partition(" ")
    options = ["--bits", bits] if bits else []
    if form in ("gptq", "awq"):
        options += ["--group-size", str(GROUP_SIZE)]
    if calibrated:
        options += ["--calibration", str(CALIBRATION)]

    def write(source: Path, target: Path) -> None:
        command = [sys.executable, "-m", "pagedcore.cli", "quantize", str(source), *options]
        command += ["--format", form, "--output", str(target), "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True)

    return write


MADE: dict[str, Write] = {
    **{name: written(name) for name in WRITTEN},
    **{f"gguf {name}": blocks(name) for name in GGUF_KINDS},
    **{f"quantize {name}": quantized(name) for name in QUANTIZE},
    **{f"quantize {name}, calibrated": quantized(name, calibrated=True) for name in CALIBRATED},
}
"""By name: what makes a folder of a format from one of 16 bits."""


def all_names() -> list[str]:
    """Every format, those in float8 last."""
    names = ["bfloat16", "fp8 while loading", "gguf FILE", *MADE]
    names += [f"kv {form}" for form in CACHES]
    return sorted(names, key=is_slow)


def is_slow(name: str) -> bool:
    """Whether weights are in float8."""
    return name.removeprefix("quantize ").startswith("fp8")


@contextmanager
def options_for(name: str, model: str) -> Iterator[dict[str, str]]:
    """Options of the engine for `model` in a format."""
    if name == "bfloat16":
        yield {"model": model}
    elif name == "fp8 while loading":
        yield {"model": model, "quantization": "fp8"}
    elif name == "gguf FILE":
        yield {"model": f"packed:{model}"}
    elif name.startswith("kv "):
        yield {"model": model, "kv_cache_dtype": name.removeprefix("kv ")}
    else:
        with tempfile.TemporaryDirectory() as folder:
            MADE[name](source_folder(model), Path(folder))
            yield {"model": folder}


def weight_bytes(options: dict[str, str], device: str) -> int:
    """What the weights take in memory, as `pagedcore plan` counts it."""
    config = EngineConfig.from_options(**options, device=device, dtype="bfloat16")
    plan, _ = plan_engine(config, source_folder(options["model"]), load_plugins(()), gpu=None)
    return plan.weight_bytes


def ask(llm: LLM, question: str, num_tokens: int, **more: bool) -> str:
    """The likeliest answer."""
    likeliest = SamplingParams(temperature=0, max_tokens=num_tokens, **more)
    messages = [{"role": "user", "content": question}]
    return llm.chat(messages, likeliest, progress=False)[0].outputs[0].text


def perplexity(llm: LLM) -> float:
    """Of the first tokens of each text: the geometric mean."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    texts = [path.read_text(encoding="utf-8") for path in READ]
    prompts = [llm.tokenizer.encode(text)[:TEXT_TOKENS] for text in texts]
    outputs = llm.generate(prompts, params, progress=False)
    given = [
        float(entry.logprobs[0])
        for output in outputs
        for entry in output.prompt_logprobs[1:]  # nothing precedes the first
    ]
    return math.exp(-sum(given) / len(given))


def measure(name: str, model: str, device: str) -> dict[str, object]:
    num_tokens = SLOW_TOKENS if is_slow(name) and device == "cpu" else NUM_TOKENS
    with options_for(name, model) as options:
        folder = source_folder(options["model"])
        on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        in_memory = weight_bytes(options, device)
        started = time.perf_counter()
        llm = LLM(**options, device=device, dtype="bfloat16", max_model_len=1024, max_num_seqs=8)
        loaded = time.perf_counter() - started
        answer, short = (ask(llm, question, num_tokens) for question in (QUESTION, SHORT))
        begun = time.perf_counter()
        ask(llm, QUESTION, num_tokens, ignore_eos=True)
        rate = num_tokens / (time.perf_counter() - begun)
        read = perplexity(llm)
        llm.close()
    return {
        "disk_megabytes": round(on_disk / 1e6, 1),
        "memory_megabytes": round(in_memory / 1e6, 1),
        "load_seconds": round(loaded, 2),
        "tokens_per_second": round(rate, 2),
        "perplexity": round(read, 2),
        "answer": answer,
        "short_answer": short,
        "says_paris": "Paris" in answer,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a model of a GGUF file")
    parser.add_argument("--formats", nargs="+", default=all_names())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(machine.RESULTS / "formats.json"))
    args = parser.parse_args()
    figures = {}
    heads = f"{'disk MB':>8}{'memory':>8}{'load s':>8}{'tokens/s':>10}{'perplexity':>12}"
    print(f"{'':28}{heads}  Paris, short")
    for name in args.formats:
        found = figures[name] = measure(name, args.model, args.device)
        print(
            f"{name:28}{found['disk_megabytes']:8,.0f}{found['memory_megabytes']:8,.0f}"
            f"{found['load_seconds']:8.1f}{found['tokens_per_second']:10.1f}"
            f"{found['perplexity']:12.2f}  {'yes' if found['says_paris'] else 'NO   '}, "
            f"{found['short_answer'][:50]}",
            flush=True,
        )
    machine.write_result(
        args.out,
        arguments={name: value for name, value in vars(args).items() if name != "out"},
        threads=torch.get_num_threads(),
        load_average=os.getloadavg(),
        formats=figures,
    )
    return 0 if all(found["says_paris"] for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

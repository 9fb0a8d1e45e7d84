"""A small model in every weight format: its size, its speed for one token, and what it answers.

    python bench/formats.py [--formats "gptq 4" awq ...] [--out bench/results/formats.json]

The model's matrices are rounded to the nearest in each format, by the same writers that the tests
use, and the packed file is read as any checkpoint is. Each is asked for the capital of France; a
line says whether Paris is in the answer. `gguf` is the model's own file, with its blocks kept, and
`fp8` rounds while it loads.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import machine
import torch
from safetensors.torch import load_file, save_file

from pagedcore import LLM, SamplingParams
from pagedcore.plugins import collect, load_plugins
from pagedcore.sources import find_model
from pagedcore.testing.written_formats import WRITTEN

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NUM_TOKENS = 32
OTHERS = ("bfloat16", "fp8", "gguf")
"""Beside those of WRITTEN."""


def source_folder(model: str) -> Path:
    """The folder of a model in 16 bits."""
    return find_model(model, collect(load_plugins(()), "pagedcore_sources"))


def write_format(source: Path, target: Path, name: str) -> None:
    """Copy a model of 16 bits into `target`, its layers' matrices in a format of WRITTEN."""
    form, tensors = WRITTEN[name], {}
    for file in sorted(source.glob("*.safetensors")):
        for tensor_name, tensor in load_file(file).items():
            layer = tensor_name.removesuffix("_proj.weight")
            if layer == tensor_name:
                tensors[tensor_name] = tensor
                continue
            written, _ = form.write(tensor.float())
            tensors |= {f"{layer}_proj.{what}": value for what, value in written.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = dict(form.config)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in source.glob("*.json"):
        if path.name != "config.json" and "index" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    for path in source.glob("*.jinja"):
        (target / path.name).write_bytes(path.read_bytes())


@contextmanager
def options_for(name: str, model: str) -> Iterator[dict[str, str]]:
    """Options of the engine for `model` in a format."""
    if name == "bfloat16":
        yield {"model": model}
    elif name == "fp8":
        yield {"model": model, "quantization": "fp8"}
    elif name == "gguf":
        yield {"model": f"packed:{model}"}
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_format(source_folder(model), Path(folder), name)
            yield {"model": folder}


def measure(name: str, model: str, device: str) -> dict[str, object]:
    with options_for(name, model) as options:
        started = time.perf_counter()
        llm = LLM(**options, device=device, dtype="bfloat16", max_model_len=1024, max_num_seqs=8)
        loaded = time.perf_counter() - started
        greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        answer = llm.chat(QUESTION, greedy, progress=False)[0].outputs[0].text
        long = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        rates = []
        for _ in range(2):
            begun = time.perf_counter()
            llm.chat(QUESTION, long, progress=False)
            rates.append(NUM_TOKENS / (time.perf_counter() - begun))
        folder = source_folder(options["model"])
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        llm.close()
    return {
        "megabytes": size / 1e6,
        "load_seconds": loaded,
        "tokens_per_second": max(rates),
        "answer": answer,
        "says_paris": "Paris" in answer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a model of a GGUF file")
    parser.add_argument("--formats", nargs="+", default=[*OTHERS, *WRITTEN])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(machine.RESULTS / "formats.json"))
    args = parser.parse_args()
    figures = {}
    print(f"{'':25}{'MB':>7}{'load s':>8}{'tokens/s':>10}  Paris")
    for name in args.formats:
        found = figures[name] = measure(name, args.model, args.device)
        print(
            f"{name:25}{found['megabytes']:7,.0f}{found['load_seconds']:8.1f}"
            f"{found['tokens_per_second']:10.1f}  {'yes' if found['says_paris'] else 'NO'}",
            flush=True,
        )
    machine.write_result(
        args.out, arguments=vars(args), threads=torch.get_num_threads(), formats=figures
    )


if __name__ == "__main__":
    main()

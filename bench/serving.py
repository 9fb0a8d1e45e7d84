"""Latencies of a served model under requests that arrive over time, on one GPU, over HTTP.

    python bench/serving.py --shape llama-3.1-8b --rate 15 --out bench/results/serving.json

Needs an installation (of wheels, say). Weights are random, and so the tokenizer has a word for each
id. Starts `pagedcore serve --server asgi` on a free port, asks with `pagedcore bench serve`, and
prints the start's seconds, TTFT and TPOT. The client runs on the same machine.

It asks three times: prompts that are `new` to a server which has only just started; `warm`, other
new prompts; and `seen`, those of the round before, which the server's prefix cache holds: what a
benchmark prints that is run twice with one seed.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from machine import write_result
from model_shapes import SHAPES, write

PEER = {"llama-3.1-8b": dict(p50_ttft_ms=25.6, p99_ttft_ms=39.6, p50_tpot_ms=5.50)}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for each id, so that whatever is drawn has a text."""
    vocabulary = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Fast"}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(process: subprocess.Popen, port: int, timeout_s: float = 300) -> float:
    """Seconds until /readyz answers 200."""
    started = time.perf_counter()
    while time.perf_counter() - started < timeout_s:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
                if answer.status == 200:
                    return time.perf_counter() - started
        except OSError:
            pass
        time.sleep(0.02)
    raise SystemExit("the server did not become ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--rate", type=float, default=15.0, help="requests per second, Poisson")
    parser.add_argument("--num-prompts", type=int, default=450)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--settle", type=float, default=20.0, help="seconds for graphs, when ready")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write(str(folder))
    model = folder / args.shape
    write_tokenizer(model, SHAPES[args.shape]["vocab_size"])
    port, figures = free_port(), folder / "figures.json"
    command = [sys.executable, "-m", "pagedcore.cli"]
    serve = ["serve", str(model), "--server", "asgi", "--port", str(port), "--load-format", "dummy"]
    serve += ["--max-model-len", "8192", "--gpu-memory-utilization", "0.85", *args.serve]
    bench = ["bench", "serve", "--port", str(port), "--num-prompts", str(args.num_prompts)]
    bench += ["--random-input-len", str(args.input_len), "--ignore-eos"]
    bench += ["--random-output-len", str(args.output_len), "--request-rate", str(args.rate)]
    bench += ["--save-result", "--result-dir", str(folder), "--result-filename", figures.name]
    server = subprocess.Popen([*command, *serve])
    rounds: dict[str, dict[str, object]] = {}
    try:
        ready_s = wait_ready(server, port)
        print(f"start to ready: {ready_s:.1f} s", flush=True)
        time.sleep(args.settle)
        for name, seed in (("new", 0), ("warm", 1), ("seen", 1)):
            print(f"--- {name}", flush=True)
            subprocess.run(
                [*command, *bench, "--seed", str(seed)],
                check=True,
                env={**os.environ, "COLUMNS": "100"},
            )
            result = json.loads(figures.read_text())
            rounds[name] = {k: v for k, v in result.items() if not isinstance(v, list)}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    print(json.dumps(PEER.get(args.shape, {})))
    if args.out:
        write_result(args.out, arguments=vars(args), ready_seconds=ready_s, rounds=rounds)


if __name__ == "__main__":
    main()

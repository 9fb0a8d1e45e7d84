"""Logits of the Triton kernels beside plain torch, on the same random weights and the same GPU.

    python bench/logits.py --out bench/results/h200-logits.json
    TRITON_INTERPRET=1 python bench/logits.py --dry-run    # on a CPU, with tiny shapes

Runs without an installation. Tokens are given, so that all see the same: three prompts at once, one
long prompt in two chunks beside sequences that decode, then decode steps of all, and a short
extension. Plain torch in float32, with weights as they are, is the truth. Errors are root mean
squares of a token's logits as a share of the truth's. Those of the kernels may be at most FACTOR
times those of plain torch in 16 bits, at the median token, of prompts and of decode steps, near the
begin of a sequence and far from it, where windows have let go: experts that are chosen otherwise,
where two are about equally good, are no mistake.

Then the engine itself draws greedy tokens, with its graphs: as many of them must be the truth's
best, after the same tokens, as of those that plain torch in 16 bits would draw, up to SLACK.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0
SLACK = 0.1
PARTS = 256
"""Rows whose logits are compared at a time."""

KINDS = ("prompts", "far prompts", "decodes", "far decodes")
"""Tokens that are judged by themselves; the last twentieth of the long prompt is far."""

NUM_ROWS = 4
SHAPES = (
    "qwen3-0.6b",
    "llama-3.1-8b",
    "gemma-2-9b",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "deepseek-v2-lite",
)
TINY = dict(
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    vocab_size=512,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    sliding_window=16,
    bos_token_id=510,
    eos_token_id=511,
)
"""Fields of a shape in a dry run, where it has them."""

Step = dict[int, list[int]]


def make_steps(vocab_size: int, long: int, decodes: int) -> list[Step]:
    """Tokens by row of each step; row 0 has the long prompt."""
    rng = np.random.default_rng(0)

    def step(**counts: int) -> Step:
        return {int(row[1:]): rng.integers(0, vocab_size, n).tolist() for row, n in counts.items()}

    return [
        step(r1=long // 64 + 3, r2=long // 8, r3=long // 20),
        step(r0=long // 2, r1=1, r2=1),
        step(r0=long - long // 2, r1=1, r2=1, r3=1),
        *[step(r0=1, r1=1, r2=1, r3=1) for _ in range(decodes)],
        step(r0=1, r1=6, r2=1, r3=1),
    ]


class Bench:
    """One shape: its engine, and what its model computes under either backend."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        from model_shapes import SHAPES as CONFIGS
        from switched_ops import engine_of

        fields: dict[str, Any] = {}
        if args.dry_run:
            fields = {name: n for name, n in TINY.items() if name in CONFIGS[shape]}
            if shape.startswith("deepseek"):
                fields["num_key_value_heads"] = TINY["num_attention_heads"]
        if args.layers:
            most = int(fields.get("num_hidden_layers", CONFIGS[shape]["num_hidden_layers"]))
            fields["num_hidden_layers"] = min(args.layers, most)
        self.args = args
        self.length = args.long + args.decodes + 64
        self.dtype = torch.float16 if args.dry_run else torch.bfloat16
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.engine = engine_of(
            shape,
            str(self.device),
            fields,
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.length,
            max_num_seqs=8,
            num_gpu_blocks_override=200,
            enable_prefix_caching=False,
        )
        executor = self.engine._executor
        self.model, self.ops = executor._model, executor._ops
        self.vocab_size = self.model.vocab_size

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Compute as `triton`, `torch`, or `truth`."""
        from switched_ops import Widened

        with torch.inference_mode():
            if name == "triton":
                yield
                return
            with self.ops.plain():
                if name == "torch":
                    yield
                    return
                with Widened():
                    yield

    def hidden(self, name: str, steps: Sequence[Step]) -> list[dict[int, Tensor]]:
        """What each step's logits are made of."""
        from pagedcore.execution.kv_formats import as_is
        from pagedcore.testing.paged_model import PagedRows

        with self.within(name):
            rows = PagedRows(
                self.model,
                self.ops,
                as_is(torch.float32 if name == "truth" else self.dtype),
                device=self.device,
                num_rows=NUM_ROWS,
                block_size=self.ops.block_size,
                max_positions=self.length,
            )
            return [rows.forward(step) for step in steps]

    def logits(self, name: str, hidden: Tensor) -> Tensor:
        with self.within(name):
            return self.model.logits(hidden).float()

    def compare(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Errors of each backend, of prompts' tokens and of single ones, near the begin and far."""
        hidden = {name: self.hidden(name, steps) for name in ("truth", "torch", "triton")}
        far_from = self.args.long * 19 // 20
        kinds: dict[str, list[tuple[Tensor, ...]]] = {kind: [] for kind in KINDS}
        lengths = [0] * NUM_ROWS
        for at, step in enumerate(steps):
            for row, tokens in step.items():
                kind = "prompts" if len(tokens) > 1 else "decodes"
                states = tuple(of_steps[at][row] for of_steps in hidden.values())
                near = min(max(0, far_from - lengths[row]), len(tokens))
                kinds[kind].append(tuple(x[:near] for x in states))
                kinds[f"far {kind}"].append(tuple(x[near:] for x in states))
                lengths[row] += len(tokens)
        return {
            kind: self._compare(*(torch.cat(parts) for parts in zip(*found, strict=True)))
            for kind, found in kinds.items()
        }

    def _compare(self, truth: Tensor, plain: Tensor, kernels: Tensor) -> dict[str, Any]:
        errors = {name: Errors() for name in ("torch", "triton", "triton_from_torch")}
        for at in range(0, len(truth), PARTS):
            part = slice(at, at + PARTS)
            exact = self.logits("truth", truth[part])
            torchs = self.logits("torch", plain[part])
            ours = self.logits("triton", kernels[part])
            errors["torch"].add(torchs, exact)
            errors["triton"].add(ours, exact)
            errors["triton_from_torch"].add(ours, torchs)
        return {name: found.summary() for name, found in errors.items()}

    def greedy(self) -> dict[str, Any]:
        """How many tokens that the engine draws, with its graphs, are the truth's best."""
        from pagedcore import SamplingParams
        from pagedcore.request import Request

        rng = np.random.default_rng(1)
        lengths = (5, self.args.long // 16, 1, self.args.long // 40 + 2)
        asked = [rng.integers(0, self.vocab_size, n).astype(np.int32) for n in lengths]
        params = SamplingParams(temperature=0, max_tokens=self.args.tokens, ignore_eos=True)
        for round_ in range(3):  # a graph is captured when it is needed again
            drawn: dict[int, list[int]] = {10 * round_ + i: [] for i in range(len(asked))}
            for id_, prompt in zip(drawn, asked, strict=True):
                self.engine.add(Request(id=id_, prompt_token_ids=prompt, params=params))
            while self.engine.has_work:
                output = self.engine.step()
                if output is not None:
                    for id_, token in zip(output.request_ids, output.tokens, strict=True):
                        drawn[int(id_)].append(int(token))
        tokens = list(drawn.values())
        if not all(len(found) == self.args.tokens for found in tokens):
            return {"ended_early": [len(found) for found in tokens]}
        step = {i: [*asked[i].tolist(), *tokens[i][:-1]] for i in range(len(asked))}
        best = {name: self._best(name, step) for name in ("truth", "torch")}
        own = torch.tensor(tokens, device=self.device).flatten()
        graphs = self.engine._executor._graphs
        return {
            "tokens": len(own),
            "engine_is_best": float((own == best["truth"]).float().mean()),
            "torch_is_best": float((best["torch"] == best["truth"]).float().mean()),
            "graphs": 0 if graphs is None else len(graphs._graphs),
        }

    def _best(self, name: str, step: Step) -> Tensor:
        hidden = self.hidden(name, [step])[0]
        found = [self.logits(name, hidden[i][-self.args.tokens :]).argmax(-1) for i in step]
        return torch.cat(found)


class Errors:
    """Differences of logits, token by token, as shares of the others' root mean square."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, expected: Tensor) -> None:
        size = expected.square().mean(-1).sqrt()
        off = logits - expected
        same = (logits.argmax(-1) == expected.argmax(-1)).float()
        self._found.append((off.square().mean(-1).sqrt() / size, off.abs().amax(-1) / size, same))

    def summary(self) -> dict[str, float]:
        rms, largest, same = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        return {
            "tokens": len(rms),
            "rms_median": float(rms.median()),
            "rms_p99": float(rms.quantile(0.99)),
            "max": float(largest.max()),
            "same_best": float(same.mean()),
        }


def judge(figures: Mapping[str, Any], on_gpu: bool) -> list[str]:
    """What is wrong, in words; nothing if all is well."""
    wrong = []
    for kind in KINDS:
        ours, plain = (figures[kind][name]["rms_median"] for name in ("triton", "torch"))
        if not ours <= FACTOR * plain:
            wrong.append(f"{kind}: the kernels are off by {ours:.2g}, plain torch by {plain:.2g}")
    greedy = figures["greedy"]
    if "ended_early" in greedy:
        wrong.append(f"the engine ended requests after {greedy['ended_early']} tokens")
    elif not greedy["engine_is_best"] >= greedy["torch_is_best"] - SLACK:
        wrong.append(
            f"the engine's tokens are the best {greedy['engine_is_best']:.1%} of the time, "
            f"plain torch's {greedy['torch_is_best']:.1%}"
        )
    if on_gpu and not greedy.get("graphs"):
        wrong.append("no graph was captured")
    if figures["replaced"]:
        wrong.append(f"kernels did not compile: {', '.join(figures['replaced'])}")
    return wrong


def run(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one shape, and what is wrong with them."""
    times: dict[str, float] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = do()
        times[name] = time.perf_counter() - started
        return result

    bench: Bench = timed("build", lambda: Bench(shape, args))
    steps = make_steps(bench.vocab_size, args.long, args.decodes)
    figures = timed("logits", lambda: bench.compare(steps))
    figures["greedy"] = timed("greedy", bench.greedy)
    figures["replaced"] = sorted(bench.ops.triton.replaced)
    figures["seconds"] = times
    figures["wrong"] = judge(figures, on_gpu=bench.device.type == "cuda")
    figures["passed"] = not figures["wrong"]
    bench.engine.shutdown()
    return figures


def show(shape: str, figures: Mapping[str, Any]) -> None:
    for kind in KINDS:
        words = [
            f"{name} {found['rms_median']:.2e} (max {found['max']:.2e}, "
            f"best {found['same_best']:.1%})"
            for name, found in figures[kind].items()
        ]
        print(f"{shape:17} {kind:11} {'; '.join(words)}")
    greedy, seconds = figures["greedy"], sum(figures["seconds"].values())
    if "ended_early" not in greedy:
        print(
            f"{shape:17} greedy      engine {greedy['engine_is_best']:.1%}, torch "
            f"{greedy['torch_is_best']:.1%}, {greedy['graphs']} graphs; {seconds:.0f} s"
        )
    for words in figures["wrong"]:
        print(f"{shape:17} FAILED      {words}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--layers", type=int, help="cut models to so many layers")
    parser.add_argument("--long", type=int, default=4400, help="tokens of the long prompt")
    parser.add_argument("--decodes", type=int, default=8, help="steps in which all decode")
    parser.add_argument("--tokens", type=int, default=32, help="that the engine draws for each")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    if args.dry_run:
        args.long, args.decodes, args.tokens = 60, 2, 6
    import workspace  # noqa: F401 - the folders on the path
    from machine import write_result

    shapes = {}
    for shape in args.shapes:
        shapes[shape] = run(shape, args)
        show(shape, shapes[shape])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    passed = all(figures["passed"] for figures in shapes.values())
    if args.out:
        write_result(args.out, arguments=vars(args), passed=passed, shapes=shapes)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""The bars of both mounts and of the bare server, in one go, with a stand-in engine.

    python bench/mounts.py [--quick] [--only A1 A9 ...] [--out bench/results/mounts.json]

The engine gives each of 64 streams a token every 5 ms; the client runs on the same machine. Rows
are medians of several runs, bare first and last; CPU is that of all server processes. Prints a
table with a verdict for each bar, and exits with 1 where one is missed. Absolute times want a
quiet machine; `--quick` has small counts, and only shows that everything works.
"""

import argparse
import asyncio
import resource
import statistics
import sys
import time

import mount_faults
import uvloop
from machine import RESULTS, write_result
from mount_load import OPENAI, TRITON, load
from mount_server import MountServer

STEP_S = 0.005
COUNT = 64
IDEAL = COUNT / STEP_S
PAUSE_MS = 50
"""What a stream over Triton waits for between two responses."""

ROWS = {
    "bare": ("bare", {}, OPENAI),
    "litserve": ("litserve", {}, OPENAI),
    "litserve x 2": ("litserve", {"num_api_servers": 2}, OPENAI),
    "pytriton": ("pytriton", {}, TRITON),
    "pytriton, OpenAI": ("pytriton", {}, OPENAI),
    "bare again": ("bare", {}, OPENAI),
}
MOUNTS = ("bare", "litserve", "pytriton")


class Bench:
    """Results by row, and verdicts by bar."""

    def __init__(self, *, quick, only, runs):
        self.quick = quick
        self.only = only
        self.runs = 1 if quick else runs
        self.rows = {}
        self.faults = {}
        self.verdicts = []

    def wants(self, *bars):
        return not self.only or any(bar in self.only for bar in bars)

    def run_loads(self):
        """A1 to A7."""
        long, short = (100, 40) if self.quick else (1000, 200)
        for row, (mount, options, door) in ROWS.items():
            result = self.rows[row] = {}
            if self.wants("A1", "A2", "A3", "A4", "A5"):
                with MountServer(mount, step_s=STEP_S, max_num_seqs=COUNT, **options) as server:
                    _run(server, door, COUNT, 20)  # imports, first requests
                    for name, num_tokens in (("long", long), ("short", short)):
                        runs = [_run(server, door, COUNT, num_tokens) for _ in range(self.runs)]
                        result[name] = _median(runs)
            if self.wants("A6") and door == OPENAI:
                count, num_tokens = (64, 20) if self.quick else (256, 100)
                with MountServer(mount, step_s=STEP_S, max_num_seqs=count, **options) as server:
                    _run(server, door, count, 10)
                    runs = [_run(server, door, count, num_tokens) for _ in range(self.runs)]
                    result["wide"] = _median(runs)
            if self.wants("A7") and door == OPENAI:
                count, num_tokens = (200, 16) if self.quick else (2000, 64)
                with MountServer(mount, step_s=0.05, max_num_seqs=count, **options) as server:
                    _run(server, door, 10, 4)
                    tries = min(3, self.runs)
                    runs = [_run(server, door, count, num_tokens) for _ in range(tries)]
                    result["many"] = max(runs, key=lambda run: run["first_p99_ms"])  # the worst
            print(f"  {row}: done", flush=True)

    def run_faults(self):
        """A8 to A14."""
        count = 16 if self.quick else COUNT
        actions = {
            "leave": (("A8",), lambda m: mount_faults.leave(m, 3 if self.quick else 20)),
            "kill": (("A9", "A11"), lambda m: mount_faults.kill_engine(m, count)),
            "stop": (("A10",), lambda m: mount_faults.stop_engine(m, count)),
            "term": (("A12", "A13"), lambda m: mount_faults.terminate(m, count, 400)),
            "sdk": (("A14",), mount_faults.sdk_checks),
        }
        if self.quick and not self.only:
            del actions["sdk"]
        for mount in MOUNTS:
            self.faults[mount] = {
                name: action(mount) for name, (bars, action) in actions.items() if self.wants(*bars)
            }
            print(f"  {mount}: done", flush=True)

    def judge(self):
        """Compare with the bars."""
        for row in ROWS:
            self._judge_loads(row, self.rows.get(row, {}))
        for mount in MOUNTS:
            self._judge_faults(mount, self.faults.get(mount, {}))

    def _bar(self, bar, row, what, value, op, limit, also=False):
        good = value >= limit if op == ">=" else value <= limit if op == "<=" else value == limit
        self.verdicts.append(
            dict(bar=bar, row=row, what=what, value=value, op=op, limit=limit, met=good or also)
        )

    def _judge_loads(self, row, result):
        is_triton = row == "pytriton"
        kind = row.removesuffix(" again").split(" ")[0].rstrip(",") if not is_triton else row
        if "long" in result:
            long, short = result["long"], result["short"]
            share = {"bare": (97, 92), "litserve": (95, 90), "pytriton": (90, 80)}[kind]
            short_share = 95 if row == "litserve x 2" else share[1]
            self._bar("A1", row, "% of ideal", 100 * long["tokens_per_s"] / IDEAL, ">=", share[0])
            self._bar(
                "A2", row, "% of ideal", 100 * short["tokens_per_s"] / IDEAL, ">=", short_share
            )
            self._bar("A1", row, "complete", long["complete"], "==", 1.0)
            if row in ("bare", "litserve", "pytriton"):
                limit = {"bare": 25, "litserve": 35, "pytriton": 80}[row]
                cpu, bare = long["cpu_us_per_token"], self._bare_cpu()
                also = row == "litserve" and cpu <= 1.5 * bare
                self._bar("A3", row, "us CPU/token", cpu, "<=", limit, also)
            unit = PAUSE_MS if is_triton else 1000 * STEP_S
            gap = {"bare": 3, "litserve": 5, "pytriton": 25 if is_triton else 5}[kind]
            self._bar("A4", row, "ms over step", short["gap_p99_ms"] - unit, "<=", gap)
            firsts = {"bare": (30, 70), "litserve": (50, 120), "pytriton": (120, 150)}[kind]
            self._bar("A5", row, "ms p50", short["first_p50_ms"], "<=", firsts[0])
            self._bar("A5", row, "ms max", short["first_max_ms"], "<=", firsts[1])
        if "wide" in result and kind != "pytriton":
            limit = 25_000 if kind == "bare" else 20_000
            self._bar("A6", row, "tokens/s", result["wide"]["tokens_per_s"], ">=", limit)
        if "many" in result:
            self._bar("A7", row, "complete", result["many"]["complete"], "==", 1.0)
            self._bar("A7", row, "ms first p99", result["many"]["first_p99_ms"], "<=", 2000)
            self._bar("A7", row, "ms gap p99", result["many"]["gap_p99_ms"], "<=", 300)

    def _bare_cpu(self):
        bare = [self.rows[row]["long"]["cpu_us_per_token"] for row in ("bare", "bare again")]
        return statistics.mean(bare)

    def _judge_faults(self, mount, result):
        if "leave" in result:
            self._bar("A8", mount, "ms to abort", result["leave"]["abort_ms"], "<=", 300)
        if "kill" in result:
            kill = result["kill"]
            self._bar("A9", mount, "s to errors", kill["streams_told_s"], "<=", 2)
            self._bar("A9", mount, "streams silent", kill["streams_silent"], "==", 0)
            untold = kill["asked"] - kill["streams_with_error_event"]
            self._bar("A9", mount, "streams untold", untold, "==", 0)
            self._bar("A9", mount, "s to unready", kill["unready_s"], "<=", 1)
            if mount == "pytriton":
                self._bar("A11", mount, "exit status", kill["exit_status"], "==", 1)
            else:
                self._bar("A11", mount, "s to serving", kill["serving_again_s"], "<=", 10)
        if "stop" in result:
            stop = result["stop"]
            self._bar("A10", mount, "s to errors", stop["streams_told_s"], "<=", 5)
            self._bar("A10", mount, "s to unready", stop["unready_s"], "<=", 5)
            self._bar("A10", mount, "orphans", stop["orphans"], "==", 0)
        if "term" in result:
            term = result["term"]
            self._bar("A12", mount, "unfinished", term["asked"] - term["finished"], "==", 0)
            self._bar("A12", mount, "exit status", term["exit_status"], "==", 0)
            self._bar("A12", mount, "refusal's status", term["refusals"][0][0], "==", 503)
            self._bar("A13", mount, "things left", term["left"], "==", 0)
            limit = 10 if mount == "pytriton" else 5
            self._bar("A13", mount, "s to stop", term["idle_stop_s"], "<=", limit)
        if "sdk" in result:
            self._bar("A14", mount, "cases failed", result["sdk"]["failed"], "==", 0)


def _run(server, door, count, num_tokens):
    """One load, with the server's CPU time."""
    port = server.port + (door == TRITON)
    before = server.cpu_seconds()
    result = uvloop.run(load(door, port, count, num_tokens))
    cpu = server.cpu_seconds() - before
    return {**result, "cpu_us_per_token": 1e6 * cpu / (count * num_tokens)}


def _median(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small counts, no judgement")
    parser.add_argument("--only", nargs="*", default=[], help="bars, such as A1 A9")
    parser.add_argument("--runs", type=int, default=5, help="of which the median counts")
    parser.add_argument("--out", default=str(RESULTS / "mounts.json"))
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    bench = Bench(quick=options.quick, only=set(options.only), runs=options.runs)
    started = time.perf_counter()
    if bench.wants("A1", "A2", "A3", "A4", "A5", "A6", "A7"):
        bench.run_loads()
    if bench.wants("A8", "A9", "A10", "A11", "A12", "A13", "A14"):
        bench.run_faults()
    bench.judge()
    for v in bench.verdicts:
        mark = "  " if v["met"] else " !"
        value, limit = f"{v['value']:.2f}", f"{v['op']} {v['limit']}"
        print(f"{v['bar']:>4}{mark} {v['row']:18} {v['what']:18} {value:>12}   {limit}")
    missed = [v for v in bench.verdicts if not v["met"]]
    print(f"{len(bench.verdicts) - len(missed)} of {len(bench.verdicts)} bars met")
    write_result(
        options.out,
        quick=options.quick,
        seconds=round(time.perf_counter() - started, 1),
        loads=bench.rows,
        faults=bench.faults,
        bars=bench.verdicts,
    )
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    sys.exit(main())

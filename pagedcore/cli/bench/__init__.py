"""`pagedcore bench`: the questions of vLLM's `bench`, with its names and its definitions."""

from cyclopts import App

app = App(name="bench", help="Measure speed.")
app.command(
    "pagedcore.cli.bench.latency:latency",
    name="latency",
    help="Seconds that one batch takes, from its start to its last token.",
)
app.command(
    "pagedcore.cli.bench.throughput:throughput",
    name="throughput",
    help="Requests and tokens per second when all prompts are there at once.",
)
app.command(
    "pagedcore.cli.bench.serve:serve",
    name="serve",
    help="Latencies of a running server, under requests that arrive over time.",
)
app.command(
    "pagedcore.cli.bench.startup:startup",
    name="startup",
    help="Seconds until a new process can answer.",
)
app.command(
    "pagedcore.cli.bench.kernels:kernels",
    name="kernels",
    help="Rates of a backend's kernels, beside what the device can do.",
)

"""Start a server, ask it a question through the official openai client, and stop it: `make demo`.

The first run fetches the model (98 MB). Exit status 0 means that both answers had Paris in them.
Arguments go to `pagedcore serve`, such as `--server asgi`.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import APIError, OpenAI

READY_S = 1800  # a slow network, and 2 cores that convert the model once
ANSWER_S = 300
STOP_S = 30
QUESTION = "What is the capital of France?"


def main(arguments):
    port = free_port()
    command = [sys.executable, "-m", "pagedcore.cli", "serve", "--port", str(port), *arguments]
    print(f"$ pagedcore serve --port {port}", *arguments)
    started = time.monotonic()
    server = subprocess.Popen(command)
    try:
        wait_ready(server, port)
        seconds = time.monotonic() - started
        print(f"ready after {seconds:.1f} s\n\nQ: {QUESTION}")
        ask(port)
        print(f"\nIt works. Seconds to ready: {seconds:.1f}")
    finally:
        stop(server)


def wait_ready(server, port):
    """Show that time passes until /readyz says 200."""
    started = time.monotonic()
    told = 0.0
    while server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        waited = time.monotonic() - started
        if waited > READY_S:
            sys.exit(f"demo: the server is not ready after {READY_S} s")
        if waited - told >= 5:
            told = waited
            print(f"waiting for the model ... {waited:.0f} s", flush=True)
        time.sleep(0.1)
    sys.exit(f"demo: the server ended with exit status {server.returncode} before it was ready")


def ask(port):
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=ANSWER_S)
    model = client.models.list().data[0].id
    request = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    print(f"A: {whole}\nA, streamed: ", end="")
    streamed = ""
    for chunk in client.chat.completions.create(**request, stream=True):
        piece = chunk.choices[0].delta.content or ""
        streamed += piece
        print(piece, end="", flush=True)
    print()
    for answer in (whole, streamed):
        if "Paris" not in answer:
            sys.exit(f"demo: there is no Paris in the answer {answer!r}")


def stop(server):
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            sys.exit(f"demo: the server did not stop within {STOP_S} s")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except APIError as error:
        sys.exit(f"demo: the server answered {error}")
    except KeyboardInterrupt:
        sys.exit(130)

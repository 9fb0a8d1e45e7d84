"""A server for `mounts.py`: started, watched from outside, and gone without a trace."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
MOUNTS = {
    "bare": "pagedcore_openai.serve:serve",
    "litserve": "pagedcore_litserve.serve:serve",
    "pytriton": "pagedcore_pytriton.mount:serve",
}
READY_S = 60
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class MountServer:
    """One mount with a stand-in engine; a context manager."""

    def __init__(self, mount, *, step_s=0.005, max_num_seqs=64, **server):
        self.mount = mount
        self.port = _free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="mounts-")
        root = Path(self._scratch.name)
        self.folder = root / "fake"
        self.folder.mkdir()
        _write_model(self.folder)
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        self.home = root / "h"
        engine = {
            "model": str(self.folder),
            "max_model_len": 1 << 20,
            "max_num_seqs": max_num_seqs,
        }
        self._given = {"engine": engine, "server": {"port": self.port, **server}}
        self._environment = {
            **os.environ,
            "PACED_STEP_S": str(step_s),
            "PYTHONPATH": str(HERE),
            "TMPDIR": str(self.temporary),
            "PYTRITON_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
        }
        self.log = root / "log"

    def __enter__(self):
        command = [sys.executable, HERE / "paced_engine.py", MOUNTS[self.mount]]
        command.append(json.dumps(self._given))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        self.wait_for(200, READY_S)
        if self.mount == "pytriton":
            while self._request(self.port + 1, "/v2/models/fake/ready") != 200:
                if self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text())
                time.sleep(0.05)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._scratch.cleanup()

    def ready(self):
        """The status of /readyz, or None where nobody listens."""
        return self._request(self.port, "/readyz")

    def wait_for(self, status, timeout_s):
        """Seconds until /readyz has a status; raises TimeoutError with the log."""
        started = time.perf_counter()
        while time.perf_counter() - started < timeout_s:
            if self.ready() == status:
                return time.perf_counter() - started
            time.sleep(0.01)
        raise TimeoutError(f"/readyz of {self.mount} is never {status}:\n{self.log.read_text()}")

    def engine_pid(self):
        return int((self.folder / "pid").read_text())

    def aborts(self):
        """Time and tokens of each sequence that was aborted."""
        lines = (self.folder / "aborts").read_text().splitlines()
        return [(float(line.split()[0]), int(line.split()[1])) for line in lines]

    def processes(self):
        """Ids of its processes, whoever their parent is: those that inherited its environment."""
        mark = f"TMPDIR={self.temporary}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def cpu_seconds(self):
        """Of all its processes, the engine's included."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / TICKS_PER_S

    def left(self):
        """What it has left: processes, files, shared memory."""
        files = [*self.temporary.iterdir(), *(self.home.iterdir() if self.home.exists() else ())]
        segments = list(Path("/dev/shm").glob(f"pytrtion{self.process.pid}-*"))
        return len(self.processes()) + len(files) + len(segments)

    def _request(self, port, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", path)
            return connection.getresponse().status
        return None


def _free_port():
    while True:
        port = random.randrange(12000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for offset in range(4):
                stack.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port


def _write_model(folder):
    """256 byte tokens and an end-of-sequence token, without weights."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<end>"] = 256
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "config.json").write_text("{}")

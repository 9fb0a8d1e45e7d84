"""Runs in Triton's Python backend: PyTriton's model, with cancellation, and errors fit for clients.

The mount ships this file as `model.py`, beside PyTriton's own under the name `pytriton_model.py`.
It keeps to the contract of PyTriton 0.7.0's `DecoupledResponsesHandler` (Apache License 2.0),
which asks nobody whether the client is still there, and sends tracebacks. Nothing of pagedcore is
imported here.
"""

import asyncio
import glob
import importlib
import itertools
import os
import re
import select
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

base: Any = importlib.import_module(".pytriton_model", __package__)
pb_utils: Any = base.pb_utils

MOUNT_PID = 0
"""The mount's process; filled in when this file is shipped."""

CANCEL_SOCKET = "{}-cancel.sock"
"""Name of the mount's socket in the workspace, by the model's name."""

METRICS_SOCKET = "{}-metrics.sock"
"""The same of ours, which the mount sends series to."""

UID = "_pagedcore_uid"
"""The request parameter by which the mount knows a request."""

MAX_MESSAGE_BYTES = 1 << 18

POLL_S = 0.1
"""Seconds between two looks at a request that nothing is sent for."""

_ERROR = re.compile(r"^(?:[\w.]*\.)?ClientError: \[([A-Z_]+)\] (.*)$")


class ResponsesHandler:
    """Sends what the mount yields for a request; tells it when the client has gone."""

    def __init__(
        self,
        requests_map: dict[bytes, Any],
        serializer_deserializer: Any,
        model_outputs_dict: dict[str, Any],
        *,
        uids: dict[int, str],
        tell_cancelled: Callable[[str], None],
    ) -> None:
        self._requests = requests_map
        self._serializer = serializer_deserializer
        self._outputs = model_outputs_dict
        self._uids = uids
        self._tell_cancelled = tell_cancelled

    async def handle_responses(
        self, scope: dict[str, Any], responses_queue: "asyncio.Queue[Any]", responses_future: Any
    ) -> None:
        """Serve one request until its last response is sent."""
        requests_id = scope["requests_id"]
        (request,) = self._requests[requests_id]  # batching is off
        uid = self._uids.pop(id(request))
        sender = request.get_response_sender()
        loop = asyncio.get_running_loop()
        gone = final = False
        while not final:
            try:
                flags, payload = await asyncio.wait_for(responses_queue.get(), POLL_S)
            except TimeoutError:
                if not gone and await loop.run_in_executor(None, sender.is_cancelled):
                    gone = True
                    self._tell_cancelled(uid)
                continue
            except asyncio.CancelledError:  # Triton ends
                flags = base.PyTritonResponseFlags.ERROR | base.PyTritonResponseFlags.EOS
                payload = b"ClientError: [UNAVAILABLE] the server ends"
            else:
                responses_queue.task_done()
            final = bool(flags & base.PyTritonResponseFlags.EOS)
            is_error = bool(flags & base.PyTritonResponseFlags.ERROR)
            response = self._error(payload) if is_error else self._response(request, payload)
            was_gone = gone
            gone = await loop.run_in_executor(None, _send, sender, response, final, gone)
            if gone and not was_gone and not final:
                self._tell_cancelled(uid)
            if not is_error:
                self._serializer.free_responses_resources(payload)
        self._requests.pop(requests_id)
        responses_future.set_result(None)

    def _response(self, request: Any, payload: bytes) -> Any:
        responses = self._serializer.deserialize_responses(payload) if payload else None
        if not responses:
            return None
        return base._wrap_response(responses[0], request.requested_output_names(), self._outputs)

    def _error(self, payload: bytes) -> Any:
        """The last line of a traceback, if it was written for clients."""
        lines = payload.decode(errors="replace").strip().splitlines()
        match = _ERROR.match(lines[-1]) if lines else None
        code, text = match.groups() if match else ("INTERNAL", "the request has failed")
        number = getattr(pb_utils.TritonError, code, pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, number))


def _end_with_mount() -> None:
    """End tritonserver and this process when the mount is gone: it would wait for its answers."""
    try:
        mount = os.pidfd_open(MOUNT_PID)
    except ProcessLookupError:
        pass
    else:
        select.select([mount], [], [])
    os.kill(os.getppid(), signal.SIGKILL)
    for segment in glob.glob(f"/dev/shm/pytrtion{MOUNT_PID}-*"):  # so PyTriton spells it
        os.unlink(segment)
    os._exit(1)


def _send(sender: Any, response: Any, final: bool, gone: bool) -> bool:
    """Send; whether the client has gone. It must not be asked for after the final flag."""
    gone = gone or sender.is_cancelled()
    if final:
        sender.send(None if gone else response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    elif not gone and response is not None:
        sender.send(response, 0)
    return gone


class Metrics:
    """Shows series that the mount sends, on Triton's own metrics port."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._counts: dict[tuple[str, str], float] = {}
        self._thread = threading.Thread(target=self._run, name="pagedcore-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show nothing more. Triton wants a family's metrics gone before the family."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(b"", self._path)
        self._thread.join()
        os.unlink(self._path)
        self._metrics.clear()
        self._families.clear()

    def _run(self) -> None:
        while message := self._socket.recv(MAX_MESSAGE_BYTES):
            for name, kind, about, labels, value in base.json.loads(message):
                try:
                    self._show(name, kind, about, labels, value)
                except Exception as error:
                    pb_utils.Logger.log_warn(f"the metric {name} cannot be shown: {error}")

    def _show(self, name: str, kind: str, about: str, labels: dict[str, str], value: float) -> None:
        key = (name, str(labels))
        metric = self._metrics.get(key)
        if metric is None:
            kinds = pb_utils.MetricFamily
            family = self._families.get(name)
            if family is None:
                which = kinds.GAUGE if kind == "gauge" else kinds.COUNTER
                family = self._families[name] = kinds(name=name, description=about, kind=which)
            metric = self._metrics[key] = family.Metric(labels=labels)
        if kind == "gauge":
            metric.set(value)
            return
        change = value - self._counts.get(key, 0.0)
        self._counts[key] = value
        if change < 0:  # the engine is another one
            change = value
        if change > 0:  # anything else is an error, and an error here ends the stub by a signal
            metric.increment(change)


class TritonPythonModel(base.TritonPythonModel):  # type: ignore[misc]  # known in Triton only
    """PyTriton's model, with our handler of responses."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Called by Triton once."""
        uids: dict[int, str] = {}
        counter = itertools.count()
        config = base.json.loads(args["model_config"])
        workspace = config["parameters"]["workspace-path"]["string_value"]
        address = f"{workspace}/{CANCEL_SOCKET.format(args['model_name'])}"
        notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

        def tell_cancelled(uid: str) -> None:
            try:
                notices.sendto(uid.encode(), address)
            except OSError as error:  # the mount is gone, or far behind
                pb_utils.Logger.log_warn(f"a cancelled request goes on: {error}")

        def make_handler(*arguments: Any) -> ResponsesHandler:
            return ResponsesHandler(*arguments, uids=uids, tell_cancelled=tell_cancelled)

        base.DecoupledResponsesHandler = make_handler
        super().initialize(args)
        wrap = self._requests_server._wrap_request

        def wrap_with_uid(triton_request: Any, *arguments: Any) -> Any:
            request = wrap(triton_request, *arguments)
            uid = f"{os.getpid()}-{next(counter)}"
            uids[id(triton_request)] = uid
            request.parameters[UID] = uid
            return request

        self._requests_server._wrap_request = wrap_with_uid
        threading.Thread(target=_end_with_mount, name="pagedcore-mount", daemon=True).start()
        self._metrics = Metrics(f"{workspace}/{METRICS_SOCKET.format(args['model_name'])}")

    def finalize(self) -> None:
        """Called by Triton once, at the end."""
        self._metrics.close()
        super().finalize()

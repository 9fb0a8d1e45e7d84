"""Ends LitServe's Manager: its queues live in a process that outlives a killed main process."""

import contextlib
import multiprocessing
import os
import select
import shutil
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from multiprocessing.managers import dispatch  # type: ignore[attr-defined]  # not in the stubs
from typing import Any

from pagedcore_litserve.plan import Plan


def end_manager(address: Any) -> None:
    """Let the Manager at this address end in order, if it is still there.

    For descendants of the process that started it: they know its key.
    """
    authkey = multiprocessing.current_process().authkey
    with (
        contextlib.suppress(OSError, EOFError, AuthenticationError),
        Client(address, authkey=authkey) as link,
    ):
        dispatch(link, None, "shutdown")


class Following:
    """Lets the Manager of a LitServer end with this process, from its very beginning.

    Where its workers are not there yet, nobody else would. It is a fork of this process.
    """

    def __init__(self, lit_server: Any, plans: list[Plan]) -> None:
        """Before `lit_server.run`; `plans` are those of its `PagedLitAPI`s."""
        self._plans = plans
        self._main_pid = os.getpid()
        self._forks_manager = False
        self._start = lit_server._init_manager
        lit_server._init_manager = self._start_manager
        os.register_at_fork(after_in_child=self._begin)

    def _start_manager(self, *arguments: Any) -> Any:
        self._forks_manager = True
        try:
            return self._start(*arguments)
        finally:
            self._forks_manager = False

    def _begin(self) -> None:
        if self._forks_manager:
            self._forks_manager = False
            threading.Thread(target=self._follow, name="pagedcore-main", daemon=True).start()

    def _follow(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            main = os.pidfd_open(self._main_pid)
            if os.getppid() == self._main_pid:  # and not a later process of the same id
                select.select([main], [], [])
        folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]  # not in the stubs
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for plan in self._plans:  # where there is an engine, its worker does
            plan.remove_folder()
        os._exit(1)

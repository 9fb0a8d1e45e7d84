"""Folders that are made once, and progress on the way."""

import errno
import logging
import os
import subprocess
import sys
import threading

import pytest

from pagedcore.errors import ModelError
from pagedcore.sources.cache import cache_root, cached_folder, ensure_space
from pagedcore.sources.progress import progress


def fill(folder):
    (folder / "config.json").write_text("{}")


def leftovers(cache):
    return [path.name for path in (cache / "models").glob(".*.part")]


def test_a_folder_is_made_once(cache):
    made = []

    def counted(folder):
        made.append(folder)
        fill(folder)

    folders = {cached_folder("k", counted) for _ in range(3)}

    assert folders == {cache / "models" / "k"}
    assert len(made) == 1
    assert (cache / "models" / "k" / "config.json").exists()


def test_many_at_once_make_it_once(cache):
    made, found = [], []
    ready = threading.Barrier(8)

    def slow(folder):
        made.append(folder)
        fill(folder)

    def ask():
        ready.wait()
        folder = cached_folder("k", slow)
        found.append((folder / "config.json").exists())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert found == [True] * 8


def test_a_process_waits_for_the_one_that_makes_it(cache):
    code = (
        "from pagedcore.sources.cache import cached_folder\n"
        "def fill(folder):\n"
        "    print('making', flush=True); input(); (folder / 'config.json').touch()\n"
        "cached_folder('k', fill)"
    )
    child = [sys.executable, "-c", code]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout.readline() == "making\n"

        class Release(logging.Handler):
            def emit(self, record):
                """Let the other process go on as soon as this one says that it waits."""
                assert record.getMessage().startswith("another process is fetching")
                print(file=maker.stdin, flush=True)

        logger = logging.getLogger("pagedcore.sources.cache")
        handler = Release()
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.INFO)
        try:
            folder = cached_folder("k", lambda folder: pytest.fail("it was made twice"))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert maker.returncode == 0
    assert (folder / "config.json").exists()


@pytest.mark.parametrize("error", [ModelError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_the_next_attempt_works(cache, error):
    def fails(folder):
        fill(folder)
        raise error

    with pytest.raises(type(error)):
        cached_folder("k", fails)
    assert not (cache / "models" / "k").exists()
    assert leftovers(cache) == []
    assert cached_folder("k", fill).is_dir()


def test_what_a_killed_process_left_is_thrown_away(cache):
    code = (
        "import os; from pagedcore.sources.cache import cached_folder\n"
        "def dies(folder): (folder / 'half').touch(); os._exit(1)\n"
        "cached_folder('k', dies)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert leftovers(cache) == [".k.part"]

    folder = cached_folder("k", fill)

    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert leftovers(cache) == []


def test_a_full_disk_is_one_line_with_the_remedy(cache):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelError, match=r"No space left.*or set PAGEDCORE_CACHE") as caught:
        cached_folder("k", full)
    assert str(cache) in str(caught.value)
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_made_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGEDCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be written \(Not a directory\)"):
        cached_folder("k", fill)


def test_the_space_on_a_disk_is_compared(tmp_path):
    ensure_space(tmp_path, 0)
    with pytest.raises(OSError, match="No space left"):
        ensure_space(tmp_path, 1 << 62)


def test_the_cache_is_where_the_user_says_or_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAGEDCORE_CACHE", "~/models")
    assert cache_root() == tmp_path / "models"
    monkeypatch.delenv("PAGEDCORE_CACHE")
    assert cache_root() == tmp_path / ".cache" / "pagedcore"


def test_progress_is_one_log_line_where_there_is_no_terminal(caplog, capfd):
    caplog.set_level(logging.INFO)
    with progress("Downloading x") as report:
        report(1, 2)
        report(2, 2)
    assert [record.getMessage() for record in caplog.records] == ["Downloading x"]
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal():
    """Seen from the other end of a pseudo-terminal."""
    code = (
        "from pagedcore.sources.progress import progress\n"
        "with progress('Downloading x') as report: report(50_000_000, 100_000_000)"
    )
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=env, check=True)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "Downloading x" in seen
    assert "50.0/100.0 MB" in seen

"""`gguf:` and paths that end in .gguf: files of llama.cpp's, converted once into a folder."""

import hashlib
import re
from pathlib import Path

from pagedcore.errors import ConfigError, ModelError
from pagedcore.sources.cache import cached_folder
from pagedcore.sources.progress import progress

CONVERSION = 1
"""Part of each key: raise it when a folder would now be written otherwise."""


class GgufSource:
    """GGUF files of this machine."""

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the folder made of the file at the path `name`, converting it the first time.

        A file that was changed since is converted again.
        """
        path = Path(name).expanduser()
        if revision is not None:
            raise ConfigError(f"revision {revision!r} was asked for, but the file {path} has none.")
        try:
            stat = path.stat()
            path = path.resolve()
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Check the path.") from error
        key = conversion_key(path.stem, path, stat.st_size, stat.st_mtime_ns)
        return cached_folder(key, lambda folder: convert_to(path, folder))


def conversion_key(stem: str, *identity: object) -> str:
    """A name for the folder that a file becomes: readable, and unlike that of any other file."""
    digest = hashlib.sha256(repr((CONVERSION, *identity)).encode("utf-8", "surrogateescape"))
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', stem)[:80]}-{digest.hexdigest()[:16]}"


def convert_to(path: Path, folder: Path) -> None:
    """Convert the GGUF file at `path` into `folder`, showing progress."""
    from pagedcore.sources.gguf_convert import convert

    with progress(f"Converting {path.name}") as report:
        convert(path, folder, report)

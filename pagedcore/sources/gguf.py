"""`gguf:` and paths that end in .gguf: files of llama.cpp's, converted once into a folder.

`fetch` widens all weights to 16 bits. `fetch_packed` keeps the blocks of layers and of
the head as they are.
"""

import hashlib
import re
from pathlib import Path

from pagedcore.errors import ConfigError, ModelError
from pagedcore.sources.cache import cached_folder
from pagedcore.sources.progress import progress

CONVERSION = 1
"""Part of each key: raise it when a folder would now be written otherwise."""

PACKED_CONVERSION = 2
"""The same for folders with blocks."""


class GgufSource:
    """GGUF files of this machine."""

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the folder made of the file at the path `name`, converting it the first time.

        A file that was changed since is converted again.
        """
        return self._fetch(name, revision, packed=False)

    def fetch_packed(self, name: str, revision: str | None) -> Path:
        """As `fetch`, with the weights of layers and of the head in the file's own blocks."""
        return self._fetch(name, revision, packed=True)

    def _fetch(self, name: str, revision: str | None, *, packed: bool) -> Path:
        path = Path(name).expanduser()
        if revision is not None:
            raise ConfigError(f"revision {revision!r} was asked for, but the file {path} has none.")
        try:
            stat = path.stat()
            path = path.resolve()
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Check the path.") from error
        key = conversion_key(path.stem, path, stat.st_size, stat.st_mtime_ns, packed=packed)
        return cached_folder(key, lambda folder: convert_to(path, folder, packed=packed))


def conversion_key(stem: str, *identity: object, packed: bool) -> str:
    """A name for the folder that a file becomes: readable, and unlike that of any other file."""
    if packed:
        stem, identity = f"{stem}-packed", ("packed", PACKED_CONVERSION, *identity)
    digest = hashlib.sha256(repr((CONVERSION, *identity)).encode("utf-8", "surrogateescape"))
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', stem)[:80]}-{digest.hexdigest()[:16]}"


def convert_to(path: Path, folder: Path, *, packed: bool) -> None:
    """Convert the GGUF file at `path` into `folder`, showing progress."""
    from pagedcore.sources.gguf_convert import convert

    with progress(f"Converting {path.name}") as report:
        convert(path, folder, report, packed=packed)

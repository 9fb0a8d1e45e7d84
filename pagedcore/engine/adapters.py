"""The adapters (LoRA) of an engine: who may be loaded, and what a request's name stands for."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pagedcore.errors import ConfigError, MissingError, ModelError, RequestError
from pagedcore.lora_config import LoraConfig
from pagedcore.request import Request

if TYPE_CHECKING:
    from pagedcore.execution.adapter_store import AdapterStore

Keys = Callable[[], Collection[str]]


class Adapters:
    """Loads and unloads at run time, and lets requests name what is loaded.

    `store` is None where the engine has no room for adapters; `in_use` tells the keys that live
    requests have.
    """

    def __init__(
        self,
        store: "AdapterStore | None" = None,
        config: LoraConfig | None = None,
        served_model_names: Collection[str] = (),
        in_use: Keys = tuple,
    ) -> None:
        self._store = store
        self._root = None if config is None else config.lora_root
        self._served_model_names = served_model_names
        self._in_use = in_use

    def listed(self) -> dict[str, str]:
        """Folders by name."""
        return {} if self._store is None else self._store.listed()

    def load(self, name: str, folder: str, *, is_trusted: bool = False) -> None:
        """Read an adapter and give it a name (LORA-2).

        Unless the caller `is_trusted`, the folder must be below the root that was allowed at the
        start. Raises RequestError, naming the field, and MissingError for a folder that is not
        there; nothing has changed then.
        """
        store = self._opened()
        if name in self._served_model_names:
            raise RequestError(f"{name!r:.80} is the name of the model itself", "lora_name")
        path = Path(folder) if is_trusted else self._allowed(folder)
        if not path.is_dir():
            raise MissingError(f"there is no folder {folder!r:.200}", "lora_path")
        try:
            store.load(name, path, self._in_use())
        except ConfigError as error:
            raise RequestError(str(error), "lora_name") from None
        except ModelError as error:
            raise RequestError(str(error), "lora_path") from None

    def unload(self, name: str) -> None:
        """Forget a name; requests that run with it go on. Raises MissingError if unknown."""
        if not self._opened().unload(name, self._in_use()):
            raise self._unknown(name, "lora_name")

    def settle(self, request: Request) -> None:
        """Note which adapter a request's name stands for now; raises MissingError for none."""
        request.adapter_key = ""
        if request.adapter is None:
            return
        key = None if self._store is None else self._store.key_of(request.adapter)
        if key is None:
            raise self._unknown(request.adapter, "model")
        request.adapter_key = key

    def _opened(self) -> "AdapterStore":
        if self._store is None:
            raise RequestError("this engine has no room for adapters: start it with --enable-lora")
        return self._store

    def _allowed(self, folder: str) -> Path:
        """The folder, if it and what it holds are below the root."""
        if self._root is None:
            raise RequestError(
                "no folder may be loaded from: start the engine with --lora-root", "lora_path"
            )
        try:
            root = Path(self._root).expanduser().resolve()
            path = (root / folder).resolve()
            inside = [path, *(p.resolve() for p in path.glob("adapter_*"))]
        except (OSError, ValueError, RuntimeError):  # such as a NUL, or links in a circle
            inside = []
        if not inside or not all(one.is_relative_to(root) for one in inside):
            raise RequestError(
                "lora_path must be a folder below the one that --lora-root allows", "lora_path"
            )
        return path

    def _unknown(self, name: str, param: str) -> MissingError:
        return MissingError(f"The model `{name[:200]}` does not exist.", param)

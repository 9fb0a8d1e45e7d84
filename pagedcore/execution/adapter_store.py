"""The adapters (LoRA) that an engine has loaded: in the host's memory, by name."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution.adapter_files import Adapter, read_adapter
from pagedcore.execution.adapter_pool import AdaptedModel, AdaptedQuantizer, AdapterPool
from pagedcore.execution.model import Model, ModelBuild
from pagedcore.lora_config import LoraConfig, check_adapter_name
from pagedcore.step import Int32, StepPlan


class AdapterStore:
    """Reads adapters, and copies them into the slots of a pool when they are needed there."""

    def __init__(self, pool: AdapterPool, config: LoraConfig, dtype: torch.dtype) -> None:
        self._pool = pool
        self._config = config
        self._dtype = dtype
        self._keys: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        self._adapters: dict[str, Adapter] = {}
        self._rows: set[int] = set()
        self._last: tuple[Int32, bool] | None = None

    def load(self, name: str, folder: Path, in_use: Collection[str] = ()) -> None:
        """Read an adapter and give it a name. `in_use` are keys that requests still run with.

        Raises ConfigError for a name that is taken or cannot be one, or when there is no room, and
        ModelError for files that are not an adapter of this model. Then nothing has changed.
        """
        check_adapter_name(name)
        if name in self._keys:
            raise ConfigError(f"an adapter named {name!r} is loaded already: unload it first")
        self._forget(in_use)
        most = self._config.capacity
        if len(self._adapters) >= most:
            raise ConfigError(
                f"{len(self._adapters)} adapters are loaded, or still run, and at most {most} are "
                "held: unload one, or raise --max-cpu-loras"
            )
        adapter = read_adapter(
            folder,
            self._pool.shapes,
            max_rank=self._pool.max_rank,
            dtype=self._dtype,
            lock_pages=self._pool.device.type == "cuda",
        )
        self.add(name, adapter, str(folder))

    def add(self, name: str, adapter: Adapter, path: str = "") -> None:
        """Give an adapter that was read or made a name, which must be free."""
        self._adapters.setdefault(adapter.key, adapter)
        self._pool.adapt(adapter.matrices)
        self._keys[name], self._paths[name] = adapter.key, path

    def unload(self, name: str, in_use: Collection[str] = ()) -> bool:
        """Forget a name, and its memory once nothing runs with it (LORA-2); False if unknown."""
        if self._keys.pop(name, None) is None:
            return False
        del self._paths[name]
        self._forget(in_use)
        return True

    def key_of(self, name: str) -> str | None:
        """What identifies the content of the adapter with this name; None if there is none."""
        return self._keys.get(name)

    def listed(self) -> dict[str, str]:
        """Folders by name, in the order in which they were loaded."""
        return dict(self._paths)

    @property
    def adapted_layers(self) -> int:
        """See `AdapterPool`."""
        return self._pool.adapted_layers

    def begin_step(self, plan: StepPlan) -> bool:
        """Bring the adapters of rows that start to the device, unless they are there already.

        Returns whether any row of the step has one.
        """
        for admission in plan.admitted:
            self._rows.discard(admission.row)
            if admission.adapter_slot >= 0:
                key = admission.request.adapter_key
                self._pool.place(admission.adapter_slot, key, self._adapters[key].matrices)
                self._rows.add(admission.row)
        if plan.admitted or self._last is None or self._last[0] is not plan.rows:
            self._last = (plan.rows, not self._rows.isdisjoint(plan.rows.tolist()))
        return self._last[1]

    def _forget(self, in_use: Collection[str]) -> None:
        kept = {*self._keys.values(), *in_use}
        self._adapters = {key: one for key, one in self._adapters.items() if key in kept}


def build_adapted(
    model_class: type[Model], build: ModelBuild, config: LoraConfig, *, is_decoder: bool
) -> tuple[Model, AdapterStore]:
    """The model with room for adapters, and those that the configuration names.

    Raises ConfigError or ModelError, also for a model that no adapter can be for.
    """
    if not is_decoder:
        raise ConfigError("enable_lora is for models that generate text, and this one does not")
    if build.shard.size > 1:
        raise ConfigError("enable_lora needs a tensor_parallel_size of 1: adapters are not divided")
    pool = AdapterPool(config.max_loras, config.max_lora_rank, build.device)
    quantizer = AdaptedQuantizer(build.quantizer, pool)
    model = AdaptedModel(model_class(replace(build, quantizer=quantizer)), pool)
    if not pool.shapes:
        raise ConfigError(
            "enable_lora: this model's layers cannot have adapters; they need model_impl=pagedcore"
        )
    store = AdapterStore(pool, config, build.dtype)
    _load_modules(store, config)
    return model, store


def _load_modules(store: AdapterStore, config: LoraConfig) -> None:
    """Load what the configuration names; raises ConfigError or ModelError, naming the adapter."""
    for name, folder in config.modules:
        try:
            store.load(name, Path(folder).expanduser())
        except (ConfigError, ModelError) as error:
            raise type(error)(f"lora_modules: {name!r}: {error}") from error

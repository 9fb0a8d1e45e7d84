"""A model in this process, and the sampling parameters that a command line asks of it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedcore.cli.flags import engine_parameters, parameters, take
from pagedcore.request import OutputKind, SamplingParams

if TYPE_CHECKING:
    from pagedcore.engine.llm import LLM

ENGINE_FLAGS = engine_parameters(rename={"seed": "engine_seed"})
"""`--seed` is the request's here, so the engine's has another name."""

_NOT_TEXT = {"output_kind", "detokenize", "logprobs", "prompt_logprobs"}


def sampling_flags(*skip: str, max_tokens: int | None) -> list[inspect.Parameter]:
    """Flags for what a request may ask for, where text comes out and nothing else.

    `max_tokens` is the default that `open_model` is going to get.
    """
    defaults = {"max_tokens": max_tokens}
    return parameters(SamplingParams, skip=_NOT_TEXT | set(skip), defaults=defaults)


@contextmanager
def open_model(
    model: str, options: dict[str, Any], *, max_tokens: int | None
) -> Iterator[tuple["LLM", SamplingParams]]:
    """Load a model with a command's options; yields it and the parameters of its requests.

    Options that are not given come from the model's generation_config.json, and then from the
    declaration (SAMPLE-2); only `max_tokens` has the default that is given here.
    """
    from pagedcore import LLM
    from pagedcore.text.inputs import InputProcessor

    asked = take(options, SamplingParams)
    SamplingParams(**asked)  # complains before a model is loaded
    if "engine_seed" in options:
        options["seed"] = options.pop("engine_seed")
    with LLM(model, **options) as llm:
        info = llm.engine.info
        inputs = InputProcessor.from_folder(
            Path(info.model),
            llm.tokenizer,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            generation_config=options.get("generation_config", "auto"),
            chat_template=options.get("chat_template"),
        )
        defaults = {"max_tokens": max_tokens, **inputs.default_params()}
        yield llm, SamplingParams(**{**defaults, **asked, "output_kind": OutputKind.DELTA})

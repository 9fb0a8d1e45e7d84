"""`pagedcore generate`: complete one prompt, in this process."""

import sys
from typing import Any

from pagedcore.cli.flags import command
from pagedcore.cli.local import ENGINE_FLAGS, open_model, sampling_flags
from pagedcore.config import DEFAULT_MODEL
from pagedcore.errors import RequestError
from pagedcore.request import FinishReason

MAX_TOKENS = 256
"""Where neither the command line nor the model says more; a base model may never end."""


@command([*sampling_flags(max_tokens=MAX_TOKENS), *ENGINE_FLAGS])
def generate(prompt: str = "-", *, model: str = DEFAULT_MODEL, **options: Any) -> int:
    """Complete one prompt; the text goes to stdout as it comes.

    Parameters
    ----------
    prompt
        The text to go on from; `-` reads it from stdin.
    model
        A folder, a GGUF file, `hf:org/name`, `modelscope:org/name`, `wheel:...` or an alias.
    """
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty: give it as an argument or on stdin")
    with open_model(model, options, max_tokens=MAX_TOKENS) as (llm, params):
        if params.n > 1:  # streams would mix
            choices = llm.generate(text, params, progress=False)[0].outputs
            for choice in choices:
                print(f"[{choice.index}] {choice.text}")
            reasons = {choice.finish_reason for choice in choices}
        else:
            reasons = set()
            for output in llm.stream(text, params):
                print(output.outputs[0].text, end="", flush=True)
                reasons.add(output.outputs[0].finish_reason)
            print()
    if FinishReason.ERROR in reasons:
        print("pagedcore: the model failed; the log says why", file=sys.stderr)
        return 1
    return 0

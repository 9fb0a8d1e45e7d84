"""What an engine tells about itself. No scheduler and no tensors here: front ends import it."""

from dataclasses import dataclass, field

from pagedcore.pooling import PoolingInfo, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a front end must know of an engine. Plain data: it crosses processes."""

    model: str
    """The model folder."""

    served_model_names: tuple[str, ...]
    """Names that requests may use; the first is reported."""

    max_model_len: int
    """Most tokens of prompt and output together."""

    vocab_size: int
    """Rows of the model's head; token ids are below it."""

    block_size: int
    """Positions per block."""

    num_blocks: int
    """Blocks in the pool, the null block included."""

    max_num_seqs: int
    """Most sequences that run together."""

    task: Task = "generate"
    """What the model was made for; one that was not made to generate cannot."""

    pooling: PoolingInfo = field(default_factory=PoolingInfo)
    """What vectors it makes."""

    enable_lora: bool = False
    """Whether requests may name adapters beside the model."""

    startup_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of the start."""

"""Measure how fast a checkpoint reaches a device: python bench/load_weights.py FOLDER [DEVICE].

A folder that does not exist is filled with the shape of Llama-3.1-8B, 16 GB of bfloat16 in shards
of 4 GB; `--layers` makes it smaller. Prints GB/s of a first and of further reads: the first is
that of the disk, unless the page cache holds the files. `--cold` asks the kernel to forget them.
"""

import argparse
import json
import os
import pathlib
import time

import torch
from safetensors.torch import save_file

from pagedcore.execution.checkpoint import Checkpoint

H, WIDTH, KV, VOCAB = 4096, 14336, 1024, 128256
LAYER = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (KV, H),
    "self_attn.v_proj": (KV, H),
    "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (WIDTH, H),
    "mlp.up_proj": (WIDTH, H),
    "mlp.down_proj": (H, WIDTH),
    "input_layernorm": (H,),
}


def write(folder: pathlib.Path, num_layers: int) -> None:
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCAB, H), "lm_head.weight": (VOCAB, H)}
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    left = list(shapes)
    while left:
        name = left.pop(0)
        shard[name] = torch.empty(shapes[name], dtype=torch.bfloat16).fill_(0.01)
        if not left or sum(tensor.nbytes for tensor in shard.values()) > 4e9:
            file = f"model-{len(set(places.values())) + 1}.safetensors"
            save_file(shard, folder / file)
            places |= dict.fromkeys(shard, file)
            shard.clear()
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (folder / "config.json").write_text('{"dtype": "bfloat16"}', encoding="utf-8")


def forget(folder: pathlib.Path) -> None:
    os.sync()
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def load(folder: pathlib.Path, device: torch.device) -> None:
    started = time.perf_counter()
    checkpoint = Checkpoint(folder)
    shapes = checkpoint.shapes(torch.bfloat16)
    for name, tensor in checkpoint.stored.items():
        shapes.take(name, tensor.shape)
    checkpoint.check_all_taken()
    checked = time.perf_counter()
    weights = checkpoint.tensors(torch.bfloat16, device)
    kept = [weights.take(name, tensor.shape) for name, tensor in checkpoint.stored.items()]
    weights.finish()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - checked
    print(
        f"headers {1000 * (checked - started):.1f} ms, {len(kept)} tensors, "
        f"{checkpoint.num_bytes / 1e9:.2f} GB in {seconds:.2f} s: "
        f"{checkpoint.num_bytes / 1e9 / seconds:.2f} GB/s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument(
        "device", nargs="?", default="cuda:0" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        write(arguments.folder, arguments.layers)
    if torch.cuda.is_available():
        torch.cuda.init()
    for _ in range(3):
        if arguments.cold:
            forget(arguments.folder)
        load(arguments.folder, torch.device(arguments.device))

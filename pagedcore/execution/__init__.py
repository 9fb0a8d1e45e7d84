"""How a step runs: tensors, models, memory. No queues here: a `StepPlan` comes in, tokens go out.

ops.py             Ops: the operations that models are made of
torch_ops.py       TorchOps: each of them in plain torch, the specification
torch_attention.py attention in plain torch
native/            NativeOps: the CPU's operations in bfloat16, in C where it can be compiled
quantized.py, torch_quantized.py   the part of Ops that works on 8 bits
model.py           Model, Weights, ModelBuild: what a model plugin sees
layers.py          the layers that models are written with
moe_layers.py, plain_layers.py   mixtures of experts; the layers of models before Llama
encoder_layers.py, encoder_attention.py   those of encoders, which see prompts whole
renamed_weights.py Weights that have other names in the checkpoint
model_config.py    a config.json as its model's class reads it
config_fields.py   fields of a config.json, checked
rope.py            rotary angles, by the name of their scaling
quantizer.py       Quantizer: how a weight format stores and multiplies; and the unquantized one
checkpoint.py      Checkpoint: a folder's safetensors as Weights, checked before anything is read
safetensors_file.py, weight_reader.py   a file's header, and its tensors on the way to a device
random_weights.py  RandomWeights: `load_format=dummy`
devices.py         which device, in what type
memory.py          how many blocks the cache gets
survey.py, planning.py, plan.py   the same from a config.json alone, for a device that is elsewhere
kv_cache.py        allocates them, and measures what else a step needs
device_state.py    what the device keeps of each row: tokens, lengths, block tables
batch.py           a `StepPlan` as tensors: the one crossing from bookkeeping to the device
executor.py        Executor: launches steps
pooler.py          hidden states into vectors, in place of tokens
pooled_model.py    what a model, or its folder, says about its vectors
headless.py        decoders that were saved without their heads
loading.py         an Executor from a configuration: device, model, cache, in this order
graphs.py          whole decode steps as CUDA graphs
extend_graphs.py   steps with short extensions as CUDA graphs
sampler.py, logits.py, logprobs.py, torch_sampling.py   from logits to tokens
"""

"""A model in a PyTriton program of one's own.

python examples/pytriton_app.py
curl localhost:8001/v2/models/smollm2/generate -d '{"text_input": "The capital of France is",
  "sampling_parameters": "{\"temperature\": 0, \"max_tokens\": 8}"}'
"""

from pytriton.triton import Triton, TritonConfig

from pagedcore import EngineConfig
from pagedcore_pytriton import bind_paged_model, prepare_environment

if __name__ == "__main__":
    prepare_environment()  # before Triton: its processes must find this interpreter
    config = TritonConfig(http_port=8001, grpc_port=8002, metrics_port=8003)
    engine = EngineConfig.from_options(model="smollm2-135m")
    with Triton(config=config) as triton, bind_paged_model(triton, "smollm2", engine):
        triton.serve()

"""A model in a LitServe program of one's own, beside another LitAPI.

python examples/litserve_app.py
curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \
  -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
curl localhost:8000/square -H 'content-type: application/json' -d '{"input": 4}'
"""

import litserve as ls

from pagedcore import EngineConfig
from pagedcore_litserve import PagedLitAPI, run


class Square(ls.LitAPI):
    def predict(self, request):
        return {"output": request["input"] ** 2}


if __name__ == "__main__":
    model = PagedLitAPI(engine=EngineConfig.from_options(model="smollm2-135m"))
    server = ls.LitServer([model, Square(api_path="/square")], timeout=False, restart_workers=True)
    run(server, host="127.0.0.1", port=8000)  # or server.run: see `run` for what it lacks

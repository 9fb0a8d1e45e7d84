# Needs python3 and make; fetches its own uv when the machine has none.
UV := $(or $(shell command -v uv),.tools/bin/uv)
RUN := $(UV) run --exact

serve: $(UV)  ## a real model on an OpenAI API at port 8000, on GPU or CPU
	$(RUN) pagedcore serve

demo: $(UV)   ## start that server, ask it a question through the openai client, stop it
	$(RUN) python examples/demo.py

test: $(UV)   ## the whole suite; GPU tests skip without a GPU
	$(RUN) pytest -n auto --dist loadfile

check: $(UV)  ## format, lint, type-check
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

bench-cpu: $(UV)  ## pagedcore beside transformers.generate on SmolLM2-135M
	$(RUN) python bench/cpu.py

.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install --quiet uv

.PHONY: serve demo test check bench-cpu

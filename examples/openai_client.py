"""Talk to a server through the official openai client; start one first with `make serve`.

python examples/openai_client.py "Why is the sky blue?"
"""

import os
import sys

from openai import OpenAI

question = " ".join(sys.argv[1:]) or "What is the capital of France?"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # only a server started with keys looks
)
model = client.models.list().data[0].id
print(f"{model}: {question}\n")

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")

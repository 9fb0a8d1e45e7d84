"""Batches, conversations and streams in one process, without a server.

python examples/offline.py
"""

from pagedcore import LLM, SamplingParams

with LLM("smollm2-135m") as llm:
    prompts = ["The capital of France is", "The opposite of hot is", "1, 2, 3, 4,"]
    greedy = SamplingParams(temperature=0, max_tokens=16)
    for output in llm.generate(prompts, greedy):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

    question = [{"role": "user", "content": "Name three colours."}]
    [answer] = llm.chat(question, SamplingParams(temperature=0.7, seed=1, max_tokens=48))
    print("chat:", answer.outputs[0].text.strip())

    print("stream:", end=" ")
    seen = 0
    for output in llm.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=32)):
        text = output.outputs[0].text
        print(text[seen:], end="", flush=True)
        seen = len(text)
    print()

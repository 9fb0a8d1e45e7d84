"""The same draws on a GPU as on the CPU, and without waiting for it."""

import numpy as np
import pytest
import torch

from pagedcore.execution import torch_sampling
from pagedcore.execution.sampler import Sampler
from pagedcore.request import Request, SamplingParams
from pagedcore.step import Admission

VOCAB = 1000

WISHES = [
    dict(temperature=0.0),
    dict(temperature=0.7, top_p=0.9, logprobs=3),
    dict(temperature=1.2, top_k=20, min_p=0.05, logprobs=0),
    dict(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=5),
    dict(temperature=1.0, logit_bias={7: 4.0}, allowed_token_ids=list(range(50)), min_tokens=4),
]


class TorchSampling:
    sample = staticmethod(torch_sampling.sample)


def prepare(device, wishes, mode):
    """A function that draws for these sequences, of logits on the device."""
    num = len(wishes)
    sampler = Sampler(
        TorchSampling(), num_rows=num, vocab_size=VOCAB, device=device, logprobs_mode=mode
    )
    prompt = np.arange(10, dtype=np.int32)
    admissions = []
    for row, wanted in enumerate(wishes):
        request = Request(
            id=row,
            prompt_token_ids=prompt,
            params=SamplingParams(**wanted),
            eos_token_id=2,
            bad_words_token_ids=((3, 4),),
        )
        admissions.append(Admission(row, request, prompt, seed=row))
    sampler.admit(admissions)
    rows = np.arange(num, dtype=np.int32)
    on_device = torch.arange(num, device=device)
    known = torch.full((num,), 10, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device).repeat(num, 1)
    return lambda logits: sampler.draw(logits, rows, on_device, known, table, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_draw_does_not_wait_for_the_device_and_agrees_with_the_cpu(mode):
    logits = torch.randn(len(WISHES), VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    expected = prepare(torch.device("cpu"), WISHES, mode)(logits)
    device = torch.device("cuda:0")
    draw, on_device = prepare(device, WISHES, mode), logits.to(device)
    draw(on_device)  # whatever is set up once may wait
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    torch.cuda.synchronize()
    tokens = drawn.tokens.cpu().numpy().astype(np.int32)
    assert tokens.tolist() == expected.tokens.tolist()
    assert not drawn.bad.any()
    found, wanted = drawn.logprobs.result(tokens), expected.logprobs.result(tokens)
    assert found.keys() == wanted.keys()
    for i, entry in found.items():
        assert entry.token_ids.tolist() == wanted[i].token_ids.tolist()
        np.testing.assert_allclose(entry.logprobs, wanted[i].logprobs, rtol=1e-4, atol=1e-5)

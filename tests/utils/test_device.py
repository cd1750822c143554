"""nanovllm/utils/device.py: what a caller has set in PyTorch changes no token."""

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.utils.device import on_device

WISHES = [SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2),
          SamplingParams(temperature=1.5, seed=3, max_tokens=40, ignore_eos=True, top_p=.9,
                         presence_penalty=.5, logit_bias={7: 1.5}),
          SamplingParams(temperature=1.2, seed=4, max_tokens=12, top_k=40, min_p=.01)]


def answers(llm):
    outs = llm.generate([[5, 6, 7]] * 3, WISHES, use_tqdm=False)
    return [(out["token_ids"], out["logprobs"]) for out in outs]


@pytest.fixture(params=["autocast", "a device", "a dtype"])
def setting(request):
    """Something that the caller's thread has set."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif request.param == "a device":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=["auto", "plain"])
def want(request):
    with LLM(device="cpu", num_kvcache_blocks=64, kernels=request.param) as llm:
        yield request.param, llm, answers(llm)


def test_in_a_step(want, setting):
    _, llm, tokens = want
    assert answers(llm) == tokens


def test_when_an_engine_is_made(want, setting, caplog):
    kernels, _, tokens = want
    with LLM(device="cpu", num_kvcache_blocks=64, kernels=kernels) as llm:
        assert answers(llm) == tokens
    assert "is not used" not in caplog.text          # the fast path has passed its proof


@pytest.mark.processes
def test_several_ranks():
    """What one rank tells another is made on the CPU, whatever the caller's default is."""
    with LLM(device="cpu", num_kvcache_blocks=64, tensor_parallel_size=2) as llm:
        tokens = answers(llm)
        with torch.device("meta"):
            assert answers(llm) == tokens


def test_the_caller_finds_what_was_set():
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with on_device(torch.device("cpu")):
            assert torch.empty(0).device.type == "cpu"
            assert not torch.is_autocast_enabled("cpu")
        assert torch.empty(0).device.type == "meta" and torch.is_autocast_enabled("cpu")

"""Tokens drawn by kernels against day 5's sampler (tests/gpu/test_sampling.py has large ones)."""

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.gpu.sampling import TritonSampler
from nanovllm.layers.sampler import Sampler

CPU = torch.device("cpu")
WISHES = [dict(), dict(temperature=.6, top_k=20, top_p=.95), dict(temperature=1.3, top_p=.9),
          dict(temperature=0), dict(top_k=3, top_p=1e-4), dict(temperature=1e-30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_seeded_rows_get_the_plain_sampler_s_tokens(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 700, generator=g)).to(dtype)
    params = [SamplingParams(seed=i, **wish) for i, wish in enumerate(WISHES)]
    fast, taught = TritonSampler(CPU), Sampler()
    assert fast(logits, params, [4] * 6).tolist() == taught(logits, params, [4] * 6).tolist()


def test_equal_logits_and_no_numbers():
    logits = torch.zeros(4, 600)
    logits[1, 7], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    params = [SamplingParams(top_k=3, seed=1)] * 4
    tokens = TritonSampler(CPU)(logits, params, [0] * 4).tolist()
    assert tokens == Sampler()(logits, params, [0] * 4).tolist()
    assert tokens[0] < 3 and tokens[1:] == [-1] * 3


def test_wishes_are_sent_when_the_batch_changes():
    sampler, params = TritonSampler(CPU), [SamplingParams(top_k=2, seed=1)] * 2
    logits = torch.randn(2, 300)
    sampler(logits, params, [0, 0])
    first = sampler.sent
    sampler(logits, list(params), [1, 1])
    assert sampler.sent is first
    sampler(logits, [params[0], SamplingParams(seed=2)], [2, 2])
    assert sampler.sent is not first


def test_a_changed_sampler_is_what_draws(monkeypatch, caplog):
    from nanovllm.gpu import make_sampler
    assert type(make_sampler(CPU, torch.float32, 300)) is TritonSampler and not caplog.records
    monkeypatch.setattr(Sampler, "_draw", lambda self, logits, params, indices: logits.argmin(-1))
    sampler = make_sampler(CPU, torch.float32, 300)
    assert type(sampler) is Sampler and "not used" in caplog.text


def test_what_the_kernels_do_not_know_is_left_to_the_sampler(monkeypatch):
    from dataclasses import dataclass

    import nanovllm.gpu.sampling as module

    @dataclass(frozen=True)
    class More(SamplingParams):
        min_p: float = 0.0

    monkeypatch.setattr(module, "UNKNOWN", [More.__dataclass_fields__["min_p"]])
    monkeypatch.setattr(Sampler, "forward", lambda *args: "taught")
    sampler, logits = TritonSampler(CPU), torch.randn(2, 300)
    assert sampler(logits, [More(seed=1), More(seed=2, min_p=.1)], [0, 0]) == "taught"
    assert sampler(logits, [More(seed=1), More(seed=2)], [0, 0]) != "taught"


def test_a_signal_while_parameters_are_sent(monkeypatch):
    """Those of the batch before must not be taken for those of this one."""
    sampler, logits = TritonSampler(CPU), torch.randn(3, 50)
    batch = [SamplingParams(temperature=t, seed=1) for t in (.5, 1., 2.)]
    sampler(logits[:2], batch[:2], [0, 0])
    send = TritonSampler._send

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TritonSampler, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler(logits, batch, [0, 0, 0])
    monkeypatch.setattr(TritonSampler, "_send", send)
    right = TritonSampler(CPU)(logits, batch, [0, 0, 0])
    assert torch.equal(sampler(logits, batch, [0, 0, 0]), right)

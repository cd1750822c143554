"""RMSNorm, beside transformers' own."""

import pytest
import torch

from nanovllm.layers.layernorm import RMSNorm


def test_it_casts_in_the_order_of_transformers():
    """Only a narrow dtype shows it: variance in fp32, cast back, then the weight."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    x = 30 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine, right = RMSNorm(48).bfloat16(), Qwen3RMSNorm(48).bfloat16()
    with torch.no_grad():
        right.weight.copy_(torch.linspace(0.1, 2, 48))
        mine.weight.copy_(right.weight)
        assert torch.equal(mine(x), right(x))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_by_hand(eps):
    norm = RMSNorm(2, eps)
    norm.weight.data = torch.tensor([1.0, 10.0])
    out = norm(torch.tensor([[3.0, 4.0]]))
    size = (12.5 + eps) ** 0.5
    torch.testing.assert_close(out, torch.tensor([[3 / size, 40 / size]]))


def test_large_numbers_do_not_overflow_fp16():
    assert RMSNorm(8).half()(torch.full((1, 8), 6e4).half()).isfinite().all()

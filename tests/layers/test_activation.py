"""SwiGLU's gate."""

import torch
import torch.nn.functional as F

from nanovllm.layers.activation import SiluAndMul


def test_the_first_half_is_the_gate():
    gate, up = torch.randn(2, 5, 7)
    torch.testing.assert_close(SiluAndMul()(torch.cat([gate, up], -1)), F.silu(gate) * up)


def test_any_leading_dimensions():
    assert SiluAndMul()(torch.zeros(2, 3, 8)).shape == (2, 3, 4)

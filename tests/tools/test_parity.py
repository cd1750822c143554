"""tools/parity.py: equal, not loadable, and not equal."""

import sys

import pytest
from fixtures import make_checkpoint

from nanovllm.layers.rotary_embedding import RotaryEmbedding
from tools import parity as tool


@pytest.fixture
def parity(monkeypatch, capsys):
    """Runs it here; its exit status and what it shows."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        status, shown = tool.main(), capsys.readouterr()
        return status, shown.out + shown.err

    return run


def test_parity_tool(parity, tmp_path, monkeypatch):
    folder, _ = make_checkpoint("qwen2", folder=tmp_path)
    status, shown = parity(folder, "--max-tokens", 8)
    assert status == 0 and "greedy: 40 of 40 tokens agree" in shown, shown
    status, shown = parity(folder / "nope")
    assert status == 2 and "error: model: there is no folder" in shown, shown
    right = RotaryEmbedding.forward      # a change to a taught layer, which takes effect
    monkeypatch.setattr(RotaryEmbedding, "forward",
                        lambda self, positions, q, k: right(self, positions * 2, q, k))
    status, shown = parity(folder, "--max-tokens", 8)
    assert status == 1 and "NOT equal" in shown and "tokens they part" in shown, shown

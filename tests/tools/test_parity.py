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


def found(differences, part=None, margin=None):
    return {"differences": differences, "part": part, "margin": margin}


def test_one_outlier_in_a_prompt_is_no_error_and_is_named():
    """Activations of thousands at a first token: there fp32 has few digits left."""
    right = [1e-6] * 30
    verdict = tool.judge([found([0.4] + right), found(right)], 1e-3)
    assert verdict["good"] and verdict["outliers"] == [(0, 1, 0.4)]
    assert not tool.judge([found([0.4, 0.4] + right)], 1e-3)["good"]           # two are a fault
    assert tool.judge([found([0.4, 0.4] + right * 20)], 1e-3)["good"]          # of six hundred


def test_differences_everywhere_and_tokens_that_part_are_errors():
    assert not tool.judge([found([9e-4] * 60)], 1e-3)["good"]      # within it, but all alike large
    assert not tool.judge([found([float("nan")] * 60)], 1e-3)["good"]
    assert tool.judge([found([1e-6] * 60, part=3, margin=1e-6)], 1e-3)["good"]
    assert not tool.judge([found([1e-6] * 60, part=3, margin=0.1)], 1e-3)["good"]


def test_tokenizers_that_disagree(tmp_path):
    """What a loader makes of a folder, if it loses a step that tokenizer.json has."""
    import transformers
    demo = tool.ROOT / "nanovllm" / "demo_model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    assert tool.tokenizers_disagree(tokenizer, str(demo)) is None
    assert tool.tokenizers_disagree(None, str(demo)) is None
    from tokenizers.pre_tokenizers import ByteLevel
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    assert "disagree on a probe: token 0 " in tool.tokenizers_disagree(tokenizer, str(demo))

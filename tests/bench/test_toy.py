"""Random requests to scheduler and block manager with a model of a few integers."""

import pytest

from bench.toy import run_toy
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


def test_all_right_and_the_same_by_its_seed():
    seen = []
    counts = run_toy(800, 3, seen.append)
    assert counts == run_toy(800, 3) and counts != run_toy(800, 4) and seen[-1] == 800
    assert min(counts.values()) > 10, counts


def keep_pending(self):
    """Instead of discard_pending: what a failed step was to write counts as written."""
    self.publish()


def take_any(self):
    """Instead of _take: what the block held is not forgotten."""
    _, block = self.free_blocks.popitem(last=False)
    block.ref_count = 1
    return block



@pytest.mark.parametrize("cls, name, wrong, complaint", [
    (BlockManager, "discard_pending", keep_pending, "is right|of another"),
    (BlockManager, "_take", take_any, "is right|of another|remembered|tokens"),
    (BlockManager, "publish", lambda self: None, "still pending"),
    (Scheduler, "_make_room", lambda self, seq: True, "list index out of range"),
    (Scheduler, "rollback", lambda self: None, "is right|of another|still pending")])
def test_what_is_wrong_is_found(cls, name, wrong, complaint, monkeypatch):
    monkeypatch.setattr(cls, name, wrong)
    with pytest.raises((RuntimeError, IndexError), match=complaint):
        run_toy(20_000, 1)

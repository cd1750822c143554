"""Sums over ranks that read each other's memory."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from fixtures import make_checkpoint

from nanovllm.gpu import peers as module
from nanovllm.gpu.peers import PeerMemory, peers_of, sum_add_rms_norm
from nanovllm.utils.distributed import open_store
from tests.processes import started

RANK = Path(__file__).resolve().parents[1] / "peer_rank.py"


def test_two_ranks(tmp_path):
    """The kernel, and a model in two slices whose sums all go this way, against transformers."""
    files = [tmp_path / f"memory{rank}" for rank in range(2)]
    for file in files:
        file.write_bytes(bytes(PeerMemory.size(2)))
    folder, model = make_checkpoint(folder=tmp_path / "model")
    store = open_store()
    command = lambda rank: (sys.executable, RANK, rank, store.path, *files, folder,
                            tmp_path / "result")
    with started(*command(0)) as first, started(*command(1)) as second:
        errors = [rank.communicate(timeout=250)[1] for rank in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    meetings, found = torch.load(tmp_path / "result", weights_only=True)
    assert meetings == (2 * model.config.num_hidden_layers + 1) * 11      # of each row, once a sum
    ids = torch.arange(11) * 4 % 48
    with torch.inference_mode():
        want = torch.cat([model(ids[None, :7]).logits[0], model(ids[None, 7:]).logits[0]])
    for logits in found:
        assert (logits - want).abs().max() < 1e-4


def test_whoever_waits_is_let_go():
    """A rank that never comes: the flags are raised from the host, and the kernel ends."""
    memory, elsewhere = torch.zeros(2, PeerMemory.size(2), dtype=torch.uint8)
    alone = PeerMemory(memory, 0, [memory.data_ptr(), elsewhere.data_ptr()])
    place = alone.place(3, 32, torch.float32).fill_(1)
    threading.Timer(.5, alone.let_go).start()
    start = time.perf_counter()
    sum_add_rms_norm(alone, place, torch.zeros(3, 32), torch.ones(32), 1e-6)
    assert time.perf_counter() - start > .3


def test_it_is_let_go_whatever_it_was_made_in():
    """PyTorch forbids to write into what was made in inference mode, outside of it."""
    memory = torch.zeros(PeerMemory.size(1), dtype=torch.uint8)
    with torch.inference_mode():
        peers = PeerMemory(memory, 0, [memory.data_ptr()])
    peers.let_go()
    assert int(peers.over) > 0


def test_areas():
    """Never that of the sum before; a pass' first sum has its own; too large a sum has none."""
    memory = torch.zeros(PeerMemory.size(2), dtype=torch.uint8)
    peers = PeerMemory(memory, 0, [memory.data_ptr()] * 2)
    for _ in range(2):
        places = [peers.place(4, 8, torch.float16, is_first=i == 0) for i in range(5)]
        areas = [peers.offset(place) // PeerMemory.AREA for place in places]
        assert areas == [2, 0, 1, 0, 1]
    assert peers.place(PeerMemory.ROWS, 8, torch.float16).shape == (512, 8)
    assert peers.place(PeerMemory.ROWS + 1, 8, torch.float16) is None
    assert peers.place(8, PeerMemory.AREA // 4, torch.float32) is None
    assert peers.area == 0                                                # as the last that fitted


def group_of(**settings):
    return SimpleNamespace(**{**dict(peers=None, store=object(), one_host=True, rank=0,
                                     world_size=2, on_close=[], minimum=lambda x: x), **settings})


def test_memory_is_opened_once_and_by_all(monkeypatch):
    opened = []

    def open_peer_memory(*args):
        opened.append(args)
        return SimpleNamespace(let_go=len)

    monkeypatch.setattr(module, "open_peer_memory", open_peer_memory)
    gpu = torch.device("cuda")
    group = group_of()
    first = peers_of(group, gpu)
    assert first is not None and peers_of(group, gpu) is first and len(opened) == 1
    assert group.on_close == [first.let_go]
    group = group_of(minimum=lambda x: 0)                                 # another rank could not
    assert peers_of(group, gpu) is peers_of(group, gpu) is None
    assert len(opened) == 2 and not group.on_close
    for group, device in ((group_of(one_host=False), gpu), (group_of(store=None), gpu),
                          (group_of(), torch.device("cpu"))):
        assert peers_of(group, device) is None
    assert len(opened) == 2

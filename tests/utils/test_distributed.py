"""What ranks say to each other, here as threads of one process; stores and worker processes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from nanovllm.utils.distributed import (
    TensorParallelGroup, WorkerProcesses, join_store, open_store, torchrun_launched,
)

CPU = torch.device("cpu")


def on_ranks(work, size=2):
    """What `work(group)` returns on each rank."""
    store = open_store()

    def rank(number):
        group = TensorParallelGroup(join_store(store.port), number, size, CPU)
        try:
            return work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return [job.result(60) for job in [pool.submit(rank, number) for number in range(size)]]


def test_the_store_listens_to_this_host_alone():
    store = open_store()
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"
                 and c.laddr.port == store.port]
    assert [address.ip.removeprefix("::ffff:") for address in listening] == ["127.0.0.1"]
    store.set("word", "yes")
    assert join_store(store.port).get("word") == b"yes"


def test_sums_and_what_is_gathered():
    def work(group):
        mine = torch.full((2, 3), float(group.rank + 1))
        return group.all_reduce(mine.clone()).tolist(), group.gather(mine)

    (total, parts), (other_total, nothing), (last_total, none) = on_ranks(work, 3)
    assert total == other_total == last_total == [[6.0] * 3] * 2
    assert [part[0, 0].item() for part in parts] == [1, 2, 3] and nothing is none is None


def test_what_rank_0_says_arrives_everywhere():
    def work(group):
        told = []
        for ints in (torch.arange(5, dtype=torch.int32), torch.empty(0, dtype=torch.int32)):
            told.append(group.broadcast(ints if group.rank == 0 else None).tolist())
        shared = group.share(torch.tensor([7, 8]) if group.rank == 0 else torch.zeros(2).long())
        return told, shared.tolist(), group.minimum(5 - group.rank)

    assert on_ranks(work) == [([[0, 1, 2, 3, 4], []], [7, 8], 4)] * 2


def test_a_copy_of_a_layer_stays_in_the_group():
    def work(group):
        return copy.deepcopy({"group": group})["group"] is group

    assert on_ranks(work) == [True, True]


@pytest.mark.parametrize("launched, size, expected", [(None, 2, False), ("2", 2, True),
                                                      ("1", 2, False)])
def test_torchrun(launched, size, expected, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", launched)
    assert torchrun_launched(size) is expected


def test_torchrun_of_another_size(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="tensor_parallel_size=2, and torchrun started 4"):
        torchrun_launched(2)


@pytest.mark.processes
def test_a_worker_that_cannot_start_says_why():
    workers = WorkerProcesses(open_store(), {"model": "/no/such"}, range(1, 2))
    try:
        with pytest.raises(RuntimeError, match="rank 1 ended with code 1.*there is no folder"):
            workers.wait_until_ready()
    finally:
        workers.stop()
    assert all(process.poll() is not None for process in workers.processes.values())

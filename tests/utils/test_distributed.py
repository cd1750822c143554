"""What ranks say to each other, here as threads of one process, and the store where they meet."""

import copy
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from nanovllm.utils.distributed import (
    TensorParallelGroup, join_store, open_store, torchrun_launched, while_watching,
)
from tests.processes import SCRIPTS, run_python

CPU = torch.device("cpu")


def on_ranks(work, size=2):
    """What `work(group)` returns on each rank."""
    store = open_store()

    def rank(number):
        group = TensorParallelGroup(join_store(store.path), number, size, CPU)
        try:
            return work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return [job.result(60) for job in [pool.submit(rank, number) for number in range(size)]]


def listening() -> set[int]:
    """Ports at which this process listens."""
    return {c.laddr.port for c in psutil.Process().net_connections() if c.status == "LISTEN"}


def test_nobody_else_can_open_the_store():
    """It has no port, its folder is this user's alone, and is gone with it."""
    before, files = listening(), psutil.Process().num_fds()
    store = open_store()
    folder = Path(store.path).parent
    assert listening() == before
    assert folder.stat().st_uid == os.getuid() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.set("word", "yes")
    assert join_store(store.path).get("word") == b"yes"
    other = join_store(store.path)
    del store
    assert psutil.Process().num_fds() == files and not folder.exists()
    del other                            # it would write into what has the name of its file now
    assert not folder.exists()


@pytest.mark.parametrize("answer", ["wrong", "none"])
def test_somebody_in_the_place_of_a_rank_is_found_out(answer, monkeypatch):
    """gloo takes whoever comes first at its port; its place proves nothing."""
    store, right = open_store(), TensorParallelGroup._greet

    def greet(group, timeout):
        if group.rank == 0:
            return right(group, timeout)
        if answer == "wrong":
            guess = torch.zeros(2, 32, dtype=torch.uint8)
            group.control.alltoall_base(guess.clone(), guess, [], []).wait()
        return over.wait(20)

    monkeypatch.setattr(TensorParallelGroup, "_greet", greet)
    over, wait = threading.Event(), timedelta(seconds=1)
    with ThreadPoolExecutor(2) as pool:
        first, _ = (pool.submit(TensorParallelGroup, join_store(store.path), rank, 2, CPU,
                                     timeout=wait) for rank in range(2))
        try:
            with pytest.raises(RuntimeError, match="rank 1 did not prove who it is"):
                first.result(20)
        finally:
            over.set()


def test_rank_0_looks_around_while_it_waits():
    """What it finds ends the wait; without that the result is the same."""
    stopped = threading.Event()

    def work(group):
        if group.rank == 1:
            stopped.wait(20)
            return group.all_reduce(torch.ones(1)).item()
        looks = []

        def watch():
            looks.append(time.monotonic())
            if len(looks) == 3:
                raise KeyboardInterrupt

        group.watch, start = watch, time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            group.all_reduce(torch.ones(1))
        assert 0.3 < time.monotonic() - start < 5
        stopped.set()

    assert on_ranks(work)[1] == 2


def test_a_rank_that_waits_is_patient():
    """The time limit is for the others to come, not for an exchange."""
    store = open_store()

    def rank(number):
        group = TensorParallelGroup(join_store(store.path), number, 2, CPU,
                                    timeout=timedelta(seconds=1))
        group.watch = lambda: None
        time.sleep(number * 2.5)
        return group.minimum(number)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [0, 0]


def test_a_rank_that_does_not_come_is_an_error():
    with pytest.raises(RuntimeError):
        TensorParallelGroup(open_store(), 0, 2, CPU, timeout=timedelta(seconds=1))


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_letting_go_of_a_rank_that_does_not_answer():
    """gloo's end would wait for an exchange that is not over, in whatever frees it last."""
    done = run_python(SCRIPTS / "peer_that_stops.py", timeout=60)
    assert done.stdout == "it does not come\nLET GO\n", done.stderr
    assert done.returncode in (0, -signal.SIGABRT)      # C++ may abort beside the thread that waits


def test_while_watching():
    def fail():
        raise ValueError("mine")

    looks = []
    assert while_watching(lambda: time.sleep(0.5) or 7, lambda: looks.append(1)) == 7 and looks
    with pytest.raises(ValueError, match="mine"):
        while_watching(fail, fail)
    with pytest.raises(ValueError, match="mine"):
        while_watching(lambda: time.sleep(1), fail)


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


def test_what_differs_or_fails_everywhere_is_left_out():
    assert on_ranks(lambda group: group.agree("it", "", 0.1 * group.rank, 0.1)) == [True] * 2
    assert on_ranks(lambda group: group.agree("it", "", 0.2 * group.rank, 0.1)) == [False] * 2
    assert on_ranks(lambda group: group.agree("it", "", torch.nan, 0.1)) == [False] * 2


def test_what_fails_on_one_rank_alone_is_an_error(monkeypatch):
    """The others are in an exchange that this rank does not take part in."""
    monkeypatch.setattr("nanovllm.utils.distributed.PATIENCE", timedelta(seconds=0.5))

    def work(group):
        if group.rank == 0:
            with pytest.raises(RuntimeError, match="Connection closed"):
                group.all_reduce(torch.ones(5))
        else:
            with pytest.raises(RuntimeError, match="it fails on rank 1 alone, no memory; Config"):
                group.agree("it", "no memory", torch.nan, 0.1)

    on_ranks(work)


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

"""Two ranks, of which one stops itself; the other gives up waiting, lets go, and ends."""

import gc
import os
import signal
import sys
import time
from datetime import timedelta

import torch

from nanovllm.utils.distributed import TensorParallelGroup, join_store, open_store

store = open_store()
child = os.fork()
group = TensorParallelGroup(join_store(store.path), 0 if child else 1, 2, torch.device("cpu"),
                            timeout=timedelta(seconds=30))
group.minimum(1)
if not child:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)


def watch():
    if time.monotonic() > end:
        raise RuntimeError("it does not come")


end, group.watch = time.monotonic() + 1, watch
try:
    group.all_reduce(torch.ones(400_000))
except RuntimeError as error:
    print(error, flush=True)
group.close()
del group
gc.collect()
os.kill(child, signal.SIGKILL)
print("LET GO", flush=True)
sys.exit()

"""One solution of each turn and exercise of day 7."""

import sys

sys.path += [".."]               # the folder bench/
import bench
from fixtures import DEMO_MODEL


def waits_of_a_queue(due, service):
    free, waits = 0.0, []
    for t in due:
        free = max(free, t) + service        # when this one is done
        waits.append(free - t)
    return waits


def goodput(arrived, times, seconds, ttft, gap):
    kept = sum(bool(came) and came[0] - due <= ttft
               and all(b - a <= gap for a, b in zip(came, came[1:]))
               for due, came in zip(arrived, times))
    return kept / seconds


def step_limit(rows, context, weight_bytes, kv_bytes_per_token, bandwidth, flops):
    moved = weight_bytes + rows * context * kv_bytes_per_token
    operations = 2 * rows * weight_bytes / 2         # two a weight and row; two bytes a weight
    return max(moved / bandwidth, operations / flops)


def abort_request(llm, request_id):
    request = llm.requests.pop(request_id, None)
    if request is not None:
        llm.scheduler.finish(request.seq, "abort")


def exercise_7_1():
    """At once: 10, the length of the longest. One after another: 1 + 2 + … + 10 = 55. In static
    batches of five: 5 + 10 = 15, the longest of each batch.
    """
    ten = [dict(prompt=[20 + i] * 5, max_tokens=i + 1, at=0.0) for i in range(10)]
    passes = [serve(engine(num_kvcache_blocks=64, **settings), ten)["steps"]
              for settings in ({}, dict(max_num_seqs=1), dict(static_batch=5))]
    assert passes == [10, 55, 15]


def exercise_7_2():
    """The first run computes the prefix once and finds 80% of its prompt tokens. The others find
    91%, the questions too: they measure a cache that the benchmark itself has filled. (The rest
    is the end of each prompt, which fills no block.) With new ids each run is at 80%.
    """
    driver, same = engine(num_kvcache_blocks=512), bench.make_workload("shared-prefix", .1)
    hits = [bench.figures(same, serve(driver, same))["prefix_hit_rate"] for _ in range(3)]
    todo = [bench.make_workload("shared-prefix", .1, run=run) for run in range(1, 4)]
    fresh = [bench.figures(new, serve(driver, new))["prefix_hit_rate"] for new in todo]
    assert hits[1] == hits[2] > hits[0] and max(fresh) - min(fresh) < .02


def exercise_7_3():
    """About 2.3: so much is the most that full rows can gain here while memory is the limit. Keys
    and values are read once per row in both, so it is less than the quotient of the passes, 3.5.
    """
    todo = bench.make_workload("nano-vllm", .1)
    known = dict(weight_bytes=4.5e6, kv_bytes_per_token=4096, bandwidth=2e10)   # or a record's
    batches = [todo[i:i + 8] for i in range(0, len(todo), 8)]
    in_batches = sum(bench.decode_floor(batch, known) for batch in batches)
    assert 1 < in_batches / bench.decode_floor(todo, known) < len(batches)


def engine(**settings):
    """This repository's engine, as bench.py drives it."""
    return bench.engine_class("nanovllm")(str(DEMO_MODEL), "cpu", "float32", is_dummy=False,
                                          max_model_len=4096, settings=settings)


def serve(driver, requests):
    """What came when, for a list of requests."""
    return driver.run(requests, temperature=0.0, limit=120.0, tell=lambda **news: None)

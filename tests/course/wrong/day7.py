"""Typical wrong answers to the turns of day 7: (name, what was written, a word of the verdict)."""


def from_its_turn(due, service):
    return [service for _ in due]


def never_idle(due, service):
    return [(i + 1) * service - t for i, t in enumerate(due)]


def without_service(due, service):
    free, waits = 0.0, []
    for t in due:
        waits.append(max(free - t, 0.0))
        free = max(free, t) + service
    return waits


def mean_gap(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] - due <= ttft and (c[-1] - c[0]) / max(len(c) - 1, 1) <= gap
               for due, c in zip(arrived, times)) / seconds


def first_token_only(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] - due <= ttft for due, c in zip(arrived, times)) / seconds


def not_a_rate(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] - due <= ttft and all(b - a <= gap for a, b in zip(c, c[1:]))
               for due, c in zip(arrived, times))


def due_ignored(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] <= ttft and all(b - a <= gap for a, b in zip(c, c[1:]))
               for c in times) / seconds


def wait_as_gap(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] - due <= ttft and all(b - a <= gap for a, b in zip([due, *c], c))
               for due, c in zip(arrived, times)) / seconds


def limit_not_met(arrived, times, seconds, ttft, gap):
    return sum(bool(c) and c[0] - due < ttft and all(b - a < gap for a, b in zip(c, c[1:]))
               for due, c in zip(arrived, times)) / seconds


def no_cache(rows, context, weight_bytes, kv_bytes_per_token, bandwidth, flops):
    return max(weight_bytes / bandwidth, rows * weight_bytes / flops)


def shared_cache(rows, context, weight_bytes, kv_bytes_per_token, bandwidth, flops):
    moved = weight_bytes + context * kv_bytes_per_token
    return max(moved / bandwidth, rows * weight_bytes / flops)


def weights_per_row(rows, context, weight_bytes, kv_bytes_per_token, bandwidth, flops):
    return rows * (weight_bytes + context * kv_bytes_per_token) / bandwidth


def attention_counted(rows, context, weight_bytes, kv_bytes_per_token, bandwidth, flops):
    cached = rows * context * kv_bytes_per_token
    return max((weight_bytes + cached) / bandwidth, (rows * weight_bytes + 2 * cached) / flops)


def blocks_forgotten(llm, request_id):
    request = llm.requests.pop(request_id, None)
    if request is not None:
        llm.scheduler.running.pop(request.seq, None)
        if request.seq in llm.scheduler.waiting:
            llm.scheduler.waiting.remove(request.seq)


def only_the_running(llm, request_id):
    request = llm.requests.pop(request_id, None)
    if request is not None and request.seq in llm.scheduler.running:
        llm.scheduler.finish(request.seq, "abort")


def record_forgotten(llm, request_id):
    request = llm.requests.get(request_id)
    if request is not None:
        llm.scheduler.finish(request.seq, "abort")


def queue_not_told(llm, request_id):
    request = llm.requests.pop(request_id, None)
    if request is not None:
        if request.seq in llm.scheduler.running:
            del llm.scheduler.running[request.seq]
        else:
            llm.scheduler.waiting.remove(request.seq)
        llm.block_manager.free(request.seq)


WRONG = [
    ("waits_of_a_queue", from_its_turn, "was due"),
    ("waits_of_a_queue", never_idle, "idle"),
    ("waits_of_a_queue", without_service, "service"),
    ("goodput", mean_gap, "hides"),
    ("goodput", first_token_only, "gap"),
    ("goodput", not_a_rate, "0.25"),
    ("goodput", due_ignored, "due"),
    ("goodput", wait_as_gap, "no gap"),
    ("goodput", limit_not_met, "just met"),
    ("step_limit", no_cache, "keys and values"),
    ("step_limit", shared_cache, "its own"),
    ("step_limit", weights_per_row, "share one read"),
    ("step_limit", attention_counted, "left out"),
    ("abort_request", blocks_forgotten, "blocks"),
    ("abort_request", only_the_running, "queue"),
    ("abort_request", record_forgotten, "llm.requests"),
    ("abort_request", queue_not_told, "first in line"),
]

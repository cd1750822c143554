"""Hands requests out when they are due, and writes down when each token came."""

from __future__ import annotations

import time


class Recorder:
    """What came when, in one run of one engine; times are in seconds since its start."""

    def __init__(self, requests: list[dict], limit: float, tell=lambda **news: None):
        self.requests, self.limit, self.tell = requests, limit, tell
        self.pending = list(range(len(requests)))     # not handed out yet
        self.arrived = [0.0] * len(requests)
        self.times = [[] for _ in requests]
        self.tokens = [[] for _ in requests]
        self.count, self.told = 0, 0.0
        self.start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def is_late(self) -> bool:
        """Whether the time limit is over."""
        return self.now() > self.limit

    def _is_due(self, i: int) -> bool:
        request = self.requests[i]
        if "after" in request:
            return self.count >= request["after"]
        return self.now() >= request["at"]

    def take(self, most: int | None = None, is_idle: bool = False) -> list[int]:
        """Requests that are due now, at most so many; an idle engine gets at least the next one."""
        due = [i for i in self.pending if self._is_due(i)][:most]
        if not due and is_idle and self.pending:
            due = [self.pending[0]]
            time.sleep(max(0.0, self.requests[due[0]].get("at", 0.0) - self.now()))
        for i in due:
            self.pending.remove(i)
            request = self.requests[i]
            self.arrived[i] = self.now() if "after" in request else request["at"]
        return due

    def add(self, i: int, token_ids: list[int], at: float | None = None) -> None:
        """Tokens of request `i`, now or at a time; tokens beyond its max_tokens are not counted."""
        wanted = self.requests[i]["max_tokens"] - len(self.times[i])
        token_ids = list(token_ids)[:max(0, wanted)]
        at = self.now() if at is None else at
        self.times[i] += [at] * len(token_ids)
        self.tokens[i] += token_ids
        self.count += len(token_ids)
        if at - self.told > 0.2:
            self.told = at
            self.tell(progress=self.count)

    def result(self, **more) -> dict:
        """All of it, ready for JSON. A run is cut if the limit passed before all was done."""
        is_done = all(len(t) == r["max_tokens"] for t, r in zip(self.times, self.requests))
        was_cut = self.is_late() and not is_done
        last = max((t[-1] for t in self.times if t), default=self.now())
        return dict(arrived=self.arrived, times=self.times, tokens=self.tokens,
                    seconds=self.now() if was_cut else last, was_cut=was_cut, **more)

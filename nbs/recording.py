"""An LLM that writes down what each of its steps did, and when (day 5)."""

import time
from unittest.mock import patch

from nanovllm import LLM


class Recording(LLM):
    """Its `log` has a dictionary for each step.

    "rows": new tokens of each row; "start" and "all": when the step began and how long it took;
    "begun" and the names of its parts (schedule, run, _sample, postprocess): the same for each
    part. All in seconds of time.perf_counter().
    """

    def _run_step(self):
        times, begun, self.log = {}, {}, getattr(self, "log", [])

        def timed(owner, name):
            inner = getattr(owner, name)

            def call(*args):
                begun[name] = time.perf_counter()
                result = inner(*args)
                times[name] = time.perf_counter() - begun[name]
                if name == "schedule":
                    times["rows"] = [row.num_new_tokens for row in result]
                return result
            return patch.object(owner, name, call)

        start = time.perf_counter()
        with timed(self.scheduler, "schedule"), timed(self.stepper, "run"), \
                timed(self, "_sample"), timed(self.scheduler, "postprocess"):
            super()._run_step()
        self.log.append(times | {"all": time.perf_counter() - start, "start": start,
                                 "begun": begun})

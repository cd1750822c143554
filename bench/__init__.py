"""Measure engines against each other; `python bench.py` is the command in front of it.

Read workloads.py (what is asked), recorder.py (what is written down), engines/ (who answers),
compare.py (in which order), results.py (what is made of it). worker.py is the other process.
"""

from __future__ import annotations

from bench.compare import Bench
from bench.engines import ENGINES, engine_class
from bench.models import SHAPES, make_model_folder
from bench.options import parse_args
from bench.plot import draw, draw_soak
from bench.recorder import Recorder
from bench.results import decode_floor, figures, summarize
from bench.run import failures, measure
from bench.soak import drift
from bench.workloads import WORKLOADS, make_workload

__all__ = ["Bench", "ENGINES", "Recorder", "SHAPES", "WORKLOADS", "decode_floor", "draw",
           "draw_soak", "drift", "engine_class", "failures", "figures", "make_model_folder",
           "make_workload", "measure", "parse_args", "summarize"]

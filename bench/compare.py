"""One model and some engines: they are asked in turn, and every figure is kept."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.machine import PeakMemory
from bench.models import Model
from bench.process import Worker, WorkerError
from bench.results import decode_floor, figures, summarize
from bench.workloads import longest_request, make_workload


class Bench:
    """Asks the engines of `engines`, name -> (engine, settings). To be used with `with`.

    args: the options, see options.py. least_len: tokens that a request may have at least.
    """

    def __init__(self, args, model: Model, engines: dict[str, tuple[str, dict]], least_len: int):
        self.args, self.model, self.engines = args, model, engines
        self.threads = args.threads or (model.threads if args.device == "cpu" else None)
        self.workers, self.broken, self.loads = {}, {}, {}
        self.folder = tempfile.TemporaryDirectory(prefix="nanovllm-bench-")
        if model.limits is None:
            model.limits = self._ask_once("probe", model=model.folder, device=args.device,
                                          dtype=model.dtype)
        self.vocab = min(10000, model.limits["vocab"])
        self.max_model_len = min(max(4096, least_len), model.limits["max_model_len"])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for name in list(self.workers):
            self._close(name)
        self.folder.cleanup()

    def _ask_once(self, do: str, **job):
        with Worker(threads=self.threads) as worker:
            return worker.ask(do, **job)

    def _close(self, name: str) -> None:
        if worker := self.workers.pop(name, None):
            worker.close()

    def _gguf(self) -> str:
        """The model as a file for llama.cpp, written the first time."""
        file, model = Path(self.folder.name) / "model.gguf", self.model
        if not file.exists():
            self._ask_once("to_gguf", folder=model.folder, file=str(file),
                           dtype=model.limits["dtype"], is_random=model.is_dummy)
        return str(file)

    def _open(self, name: str) -> Worker:
        """The engine's worker, with the engine loaded and warm."""
        if name not in self.workers:
            (kind, settings), args, model = self.engines[name], self.args, self.model
            folder = self._gguf() if kind == "llama-cpp" else model.folder
            pythons = {"vllm": args.vllm_python, "llama-cpp": args.llama_python}
            worker = self.workers[name] = Worker(pythons.get(kind), self.threads)
            loaded = worker.ask("open", engine=kind, model=folder, device=args.device,
                                dtype=model.limits["dtype"],  # "auto" means other things to others
                                is_dummy=model.is_dummy, settings=settings,
                                max_model_len=self.max_model_len, hf_batch=args.hf_batch,
                                source=args.nano_vllm)
            self.loads[name] = loaded["load_seconds"]
            warm_up = make_workload("poisson", 0.1, -1, 0, self.vocab, requests=4, rate=1e9)
            worker.ask("run", requests=warm_up, temperature=args.temperature, limit=300.0)
        return self.workers[name]

    def run(self, workload: str, scale: float, requests: int | None = None) -> dict:
        """One workload, `runs` times, the engines in alternating order: a record of it."""
        args, limit = self.args, self.max_model_len
        asked = [make_workload(workload, scale, args.seed, run, self.vocab, requests, args.rate)
                 for run in range(args.runs)]
        if (longest := longest_request(asked[0])) >= limit:
            raise ValueError(f"workload {workload}: a request of {longest} tokens does not fit "
                             f"into the {limit} of {self.model.title}; lower --scale")
        runs, outputs, errors = {name: [] for name in self.engines}, {}, dict(self.broken)
        for run in range(args.runs):
            for name in list(self.engines)[::1 if run % 2 == 0 else -1]:
                if name in errors:
                    continue
                title = f"{self.model.title}, {workload}, run {run + 1}/{args.runs}, {name}"
                try:
                    result = self._run_one(name, title, asked[run])
                except WorkerError as error:
                    errors[name] = str(error)
                    print(f"{title}: failed: {error}", file=sys.stderr)
                else:
                    runs[name].append(figures(asked[run], result))
                    outputs[name, run] = result["tokens"]
                if not args.keep or name in errors:
                    self._close(name)
        if not args.ablate:
            self._look_again()
        return self._record(workload, scale, asked[0], runs, outputs, errors)

    def _look_again(self) -> None:
        """Measure the memory once more, behind the runs; of a limit the best measurement counts."""
        again = self._ask_once("bandwidth", device=self.args.device)
        known = self.model.limits
        self.model.limits = {**known, "bandwidth": max(known["bandwidth"], again)}

    def _run_one(self, name: str, title: str, requests: list[dict]) -> dict:
        """One engine, one run, with a progress bar; on a CPU also the most memory it held."""
        from tqdm import tqdm
        args, total = self.args, sum(r["max_tokens"] for r in requests)
        with tqdm(total=total, desc=title, unit="token", leave=False, dynamic_ncols=True,
                  disable=args.quiet) as bar:
            try:
                worker = self._open(name)
            except WorkerError as error:
                self.broken[name] = str(error)
                raise
            memory = None if args.device.startswith("cuda") else PeakMemory(worker.process.pid)
            if memory:
                memory.restart()
            result = worker.ask("run", lambda count: bar.update(count - bar.n),
                                patience=2 * args.limit + 120, requests=requests,
                                temperature=args.temperature, limit=args.limit)
        return {**result, "peak_memory_bytes": memory.peak()} if memory else result

    def _record(self, workload, scale, requests, runs, outputs, errors) -> dict:
        """One workload's figures, for the table and for JSON."""
        limits = self.model.limits
        floor, want = decode_floor(requests, limits), sum(r["max_tokens"] for r in requests)
        ceiling = want / floor if floor else None
        record = {"model": self.model.title, "workload": workload, "scale": scale,
                  "requests": len(requests), "output_tokens": want,
                  "prompt_tokens": sum(len(r["prompt"]) for r in requests),
                  "ceiling_output_throughput": ceiling, "limits": limits, "engines": {}}
        first = next((name for name in runs if runs[name]), None)
        for name, (kind, settings) in self.engines.items():
            entry = record["engines"][name] = {
                "engine": kind, "settings": settings, "load_seconds": self.loads.get(name),
                "runs": runs[name], "error": errors.get(name)}
            if runs[name]:
                summary = entry["summary"] = summarize(runs[name])
                summary["share_of_ceiling"] = (
                    summary["output_throughput"]["median"] / ceiling if ceiling else None)
                summary["same_tokens"] = {"as": first,
                                          "share": self._same_tokens(first, name, outputs)}
        return record

    def _same_tokens(self, first: str, name: str, outputs: dict) -> float | None:
        """Share of the requests that two engines answer alike, in the runs that both did."""
        if self.model.is_dummy and self.engines[name][0] != self.engines[first][0]:
            return None  # each engine draws random weights of its own
        pairs = [pair for run in range(self.args.runs)
                 if (name, run) in outputs and (first, run) in outputs
                 for pair in zip(outputs[first, run], outputs[name, run])]
        return sum(a == b for a, b in pairs) / max(1, len(pairs))

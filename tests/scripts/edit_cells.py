"""Change export cells in a notebook's shell; prints what an engine then answers, as JSON."""

import json
import sys
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

NBS = Path(__file__).resolve().parents[2] / "nbs"
sys.path.insert(0, str(NBS))
shell = InteractiveShell.instance()


def cell(day, start):
    """The source of the export cell of this day in which a line begins with `start`."""
    notebook, = NBS.glob(f"0{day}_*.ipynb")
    for found in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(found["source"])
        if source.startswith("#| export") and f"\n{start}" in source:
            return source
    raise LookupError(start)


def run(source):
    """Run a cell; an error in it is an error here."""
    shell.run_cell(source).raise_error()


def changed(source, old, new):
    """`source` with one thing changed."""
    assert source.count(old) == 1, (old, source)
    return source.replace(old, new)


def ask(kernels="auto"):
    """What an engine with these kernels says to three prompts, and how many steps it takes."""
    run(f"""
with LLM(device="cpu", num_kvcache_blocks=64, kernels={kernels!r}) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outs = llm.generate([[5, 6, 7, 8]] * 3, greedy, use_tqdm=False)
    answer = [out["token_ids"] for out in outs], llm.stats.steps
""")
    return shell.user_ns["answer"]


said = {}
sys.stdout, out = sys.stderr, sys.stdout     # the shell prints too
run("import edits; edits.count()\nfrom nanovllm import LLM, SamplingParams\n"
    "from nanovllm.engine import scheduler\nfrom nanovllm.layers import layernorm")
said["before"] = ask()

norm = cell(2, "class RMSNorm")
run(norm)                                    # nothing changed
run("assert RMSNorm is layernorm.RMSNorm")
said["the same cell"] = ask()
run(changed(norm, "return self.weight *", "return 0.2 * self.weight *"))
run("assert RMSNorm is layernorm.RMSNorm")
said["another norm"], said["another norm, plain"] = ask(), ask("plain")
run(norm)
said["the norm is back"] = ask()

row, admit = cell(4, "class ScheduledRow"), cell(4, "    def _schedule_waiting")
run(row), run(cell(4, "class Scheduler:"))
run(changed(admit, "< self.max_num_seqs", "< 1"))      # a piece of a class
run("assert Scheduler is scheduler.Scheduler")
said["one at a time"] = ask()
run(admit)
said["the scheduler is back"] = ask()

run(changed(row, "    samples: bool", "    colour: str = 'red'\n    samples: bool = True"))
run("assert ScheduledRow is scheduler.ScheduledRow and ScheduledRow(None, 1).colour == 'red'")
json.dump(said, out)                         # (a class with slots takes the place of the old one)

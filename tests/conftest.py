"""Where the tests find the package and the notebooks' fixtures; nothing reaches for the network."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs"))
sys.path.append(str(ROOT))  # last: a copy of the package named by PYTHONPATH goes first
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only cost

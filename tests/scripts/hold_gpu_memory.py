"""Holds so many bytes of GPU memory until its stdin ends."""

import sys

import torch

held = torch.zeros(int(sys.argv[1]), device="cuda", dtype=torch.uint8)
torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.read()

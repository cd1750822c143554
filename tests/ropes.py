"""Shapes of checkpoints with scaled RoPE."""

ORIGINAL = 32  # the context that scaled models were "trained" on


def rope(kind, theta=1e4, **more):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": theta, **more})


LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=ORIGINAL)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0)
LINEAR = rope("linear", factor=4.0)
DYNAMIC = dict(rope("dynamic", factor=4.0), max_position_embeddings=ORIGINAL)

"""What stands in for hardware that is not here."""

from nanovllm.engine.cuda_graphs import Recordings
from nanovllm.layers.attention import SDPABackend, store_kvcache


class EagerGraph:
    """In place of a CUDA Graph: `replay` does the step once more."""

    def __init__(self, replay):
        self.replay = replay


class EagerRecordings(Recordings):
    """Recordings that run on a CPU; `sizes_replayed`: the rows of each step."""

    def __init__(self, runner):
        super().__init__(runner)
        self.sizes_replayed = []

    def record(self, inputs):
        hidden = self.step(inputs)
        return EagerGraph(lambda: hidden.copy_(self.step(inputs))), hidden

    def replay(self, step, tokens=None):
        self.sizes_replayed.append(len(step.input_ids))
        return super().replay(step, tokens)


class PaddedBackend(SDPABackend):
    """Plain attention for steps with padded rows: they write nothing and have no keys."""
    name = "padded"
    supports_graphs = True

    def forward(self, layer, q, k, v, context):
        real = context.slot_mapping >= 0
        store_kvcache(k[real], v[real], layer.k_cache, layer.v_cache, context.slot_mapping[real])
        if context.max_seqlen_q == 1:
            return self.decode(layer, q, context).nan_to_num()
        return super().forward(layer, q, k, v, context)

"""One solution of each turn and exercise of day 5."""

import torch

from nanovllm.engine.text import Detokenizer
from nanovllm.sampling_params import SamplingParams


def nucleus(probs, p):
    order = sorted(range(len(probs)), key=lambda i: -probs[i])     # stable: lower ids first
    stay, mass = [], 0.0
    for token_id in order:
        if stay and mass >= p:          # the mass *before* this token
            break
        stay.append(token_id)
        mass += probs[token_id]
    return sorted(stay)


def sample_token(logits, params, generator):
    if params.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / params.temperature
    ordered, token_ids = logits.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k:] = -torch.inf
    if params.top_p < 1:
        probs = ordered.softmax(-1)                      # renormalised after top-k
        mass_before = probs.cumsum(-1) - probs
        mass_before[0] = 0
        ordered[mass_before >= params.top_p] = -torch.inf
    exponential = torch.empty(len(logits)).exponential_(generator=generator)
    noise = -exponential.clamp_min(1e-30).log()
    kept = torch.empty_like(ordered).scatter_(0, token_ids, ordered)      # by token id again
    return int((kept + noise).argmax())


def stream_utf8(pieces):
    shown, rest = [], b""
    for piece in pieces:
        data = rest + piece
        start = len(data)
        for at in range(max(0, len(data) - 4), len(data)):       # does a character begin late?
            byte = data[at]
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            if byte & 0xC0 != 0x80 and at + length > len(data):
                start = at
        rest = data[start:]
        shown.append(data[:start].decode(errors="replace"))
    return [*shown, rest.decode(errors="replace")]


def certain_part(text, stop):
    places = [text.find(s) for s in stop if s in text]
    if places:
        return text[:min(places)], True
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - held], False


def engine_step(engine):
    batch = engine.scheduler.schedule()
    if not batch:
        return []
    logits = engine.runner.run(batch)
    seqs = [row.seq for row in batch if row.samples]
    if not seqs:
        tokens = []
    else:
        tokens = engine.sampler(logits, [seq.sampling_params for seq in seqs],
                                [seq.num_completion_tokens for seq in seqs]).tolist()
    engine.scheduler.postprocess(batch, tokens)
    return [(seq.seq_id, token, seq.finish_reason) for seq, token in zip(seqs, tokens)]


def filter_min_p(logits, min_p):
    # p_i >= min_p * p_max  <=>  logit_i >= logit_max + log(min_p): no sort, no softmax
    limit = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
    return logits.masked_fill(logits < limit - 1e-6, -torch.inf)


def generate_n(llm, prompt, params, n):
    wishes = [SamplingParams(**{**vars(params), "seed": None if params.seed is None
                                else params.seed * 1000 + i}) for i in range(n)]
    return llm.generate([prompt] * n, wishes, use_tqdm=False)


def two_temperatures():
    """Exercise 1. The temperature comes before the cut, so it changes what the cut leaves.

    T = 1    .50 .25 .15 .10   mass before: 0 .50 .75      two tokens stay
    T = 0.5  .72 .18 .07 .03   mass before: 0 .72          one token stays
    T = 2    .37 .26 .20 .17   mass before: 0 .37 .63 .83  three tokens stay
    """


class TokenByToken(Detokenizer):
    """Exercise 4: each token alone. Text of one-byte characters adds up, "naïve" does not.

    The demo's tokenizer is byte-level: spaces belong to tokens, so plain text is right. The two
    bytes of "ï" lie in two tokens, and each alone decodes to the replacement character.
    """

    def append(self, token_id):
        self.text += self.tokenizer.decode([token_id], skip_special_tokens=True)
        self._certain = len(self.text)

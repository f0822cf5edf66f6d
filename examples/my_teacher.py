"""A model of one's own as a teacher: anything that can give logits, behind the wire of ``bbopd serve``. Here, counts of byte pairs.

python examples/my_teacher.py README.md --port 7070
bbopd check-teacher grpc://localhost:7070
"""

import argparse
from pathlib import Path

import numpy as np

from bbopd.config import ServeConfig
from bbopd.rpc.run_server import serve, set_up_logs
from bbopd.rpc.signals import signal_from_logits
from bbopd.types import LEVELS, Completion, Offer, TeacherInfo

VOCAB = 256  # bytes


class BytePairTeacher:
    """The two methods of `bbopd.rpc.backend.TeacherBackend`. Calls come one at a time, within the limits of ``info``."""

    def __init__(self, text: bytes) -> None:
        counts = np.full((VOCAB, VOCAB), 0.01)
        np.add.at(counts, (np.frombuffer(text[:-1], np.uint8), np.frombuffer(text[1:], np.uint8)), 1.0)
        self.logits = np.log(counts)  # [last byte, next byte]
        limits = {"topk": VOCAB, "candidates": VOCAB}
        offers = tuple(Offer(level, limits.get(level, 0), temperature_min=0.01, temperature_max=100.0) for level in LEVELS)
        self.info = TeacherInfo("byte-pairs", VOCAB, offers, max_sequence_tokens=4096)

    def score(self, rollouts, want):
        """Row i of a rollout's logits predicts its response token i: it stands where the token before it is."""
        return [signal_from_logits(self.logits[list(one.all_ids)[len(one.prompt.token_ids) - 1 : -1]], one, want) for one in rollouts]

    def generate(self, prompts, sampling):
        return [self._write(prompt, sampling) for prompt in prompts]

    def _write(self, prompt, sampling):
        random = np.random.default_rng([sampling.seed, *prompt.token_ids])
        written, logprobs, last = [], [], prompt.token_ids[-1]
        while len(written) < sampling.max_new_tokens:
            scaled = self.logits[last] / sampling.temperature
            order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
            p = np.exp(scaled[order] - scaled.max())
            p = p / p.sum() * (np.cumsum(p) - p < sampling.top_p * p.sum())  # the fewest best bytes that hold top_p
            last = int(random.choice(order, p=p / p.sum()))
            written.append(last)
            logprobs.append(float(scaled[last] - np.logaddexp.reduce(scaled)))
            if last in sampling.stop_token_ids:
                break
        reason = "stop" if written[-1] in sampling.stop_token_ids else "length"
        return Completion(prompt, tuple(written), bytes(written).decode(errors="replace"), reason, tuple(logprobs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="what to count")
    parser.add_argument("--port", type=int, default=7070)
    parser.add_argument("--ready-file", type=Path, help="write the address here once it is served")
    args = parser.parse_args()
    set_up_logs("text")
    serve(BytePairTeacher(args.text.read_bytes()), ServeConfig(model="byte-pairs", port=args.port), ready_file=args.ready_file)

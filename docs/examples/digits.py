"""Teach one small network to read digits on several machines, none of which has seen all ten.

The real handwritten digits of scikit-learn (1797 images of 8 x 8) are split so unevenly that most peers know two to
five of them: the shares of every digit are drawn from Dirichlet(0.1). What one peer learns alone is therefore poor.
With mpd, the peers train a few steps on what they have, average their parameters, and go on: that is Moshpit SGD
(Ryabinin et al., NeurIPS 2021), and the whole of it is the loop at the end of this page.

With a daemon running (`mpd join`), start one of these per machine, or `python docs/examples/demo.py` for four on one:

    python docs/examples/digits.py --index 0 --peers 4
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

TEST_IMAGES = 360
DIRICHLET = 0.1  # the smaller, the fewer digits a peer knows
LOCAL_STEPS = 4  # between two averagings
BATCHES_PER_SHARD = 20  # a batch is this part of the peer's own images, so everyone walks through its data equally fast
LEARNING_RATE = 0.5  # falls linearly to zero

parser = argparse.ArgumentParser(description="One trainer of the digits example.")
parser.add_argument("--index", type=int, default=0, help="which peer this is, from 0")
parser.add_argument("--peers", type=int, default=4, help="into how many shards the images are split")
parser.add_argument("--rounds", type=int, default=100, help="how often local steps and averaging take turns")
parser.add_argument("--seed", type=int, default=0, help="of split and network; the same for all peers")
parser.add_argument("--socket", help="where the daemon of this machine listens, if not at its usual place")
parser.add_argument("--run", default="digits", help="name of the run: peers that name the same one meet")
parser.add_argument("--alone", action="store_true", help="train on this peer's images only and average with nobody")
parser.add_argument("--all-data", action="store_true", help="train on everyone's images, as if they lay on one machine")
parser.add_argument("--hold", action="store_true", help="wait for a line on standard input before the first step")
parser.add_argument("--json", action="store_true", help="report progress as JSON lines")
parser.add_argument("--out", type=Path, help="write accuracy and parameters to OUT.json and OUT.npy")
args = parser.parse_args()
if not 0 <= args.index < args.peers:
    parser.error(f"--index is {args.index}: 0 to {args.peers - 1} expected with --peers {args.peers}")

torch.set_num_threads(1)  # the network is tiny, and four of us may share a machine
torch.manual_seed(args.seed)  # everyone starts from the same network ...
everyone = np.random.default_rng(args.seed)  # ... and draws the same split,
mine = np.random.default_rng((args.seed, args.index))  # but each peer draws batches of its own


def report(event: str, **facts: object) -> None:
    if args.json:
        print(json.dumps({"event": event, **facts}), flush=True)
    else:
        texts = (f"{name} {fact:.3f}" if isinstance(fact, float) else f"{name} {fact}" for name, fact in facts.items())
        print(f"{event}:", "  ".join(texts), flush=True)


# ---- data: a test set for all, the rest split by digit

images, digits = load_digits(return_X_y=True)  # (1797, 64) grey values from 0 to 16, (1797,) digits
x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(digits)
order = everyone.permutation(len(y))
test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]

shards: list[list[int]] = [[] for _ in range(args.peers)]
for digit in range(10):
    of_digit = train[digits[train] == digit]
    share = everyone.dirichlet([DIRICHLET] * args.peers)
    ends = (share.cumsum()[:-1] * len(of_digit)).astype(int)
    for shard, part in zip(shards, np.split(of_digit, ends), strict=True):
        shard.extend(part)
shard = np.concatenate(shards) if args.all_data else np.array(shards[args.index])
if len(shard) == 0:
    sys.exit(f"peer {args.index} got no images with --seed {args.seed}: choose another seed or fewer peers")

# ---- network

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.rounds)


@torch.no_grad()
def accuracy() -> float:
    return int((model(x[test]).argmax(1) == y[test]).sum()) / len(test)


# ---- training: local steps, average, repeat

with contextlib.ExitStack() as stack:
    averager = None
    if not (args.alone or args.all_data):
        from mpd.client import connect

        daemon = stack.enter_context(connect(socket=args.socket))
        averager = stack.enter_context(daemon.averager(args.run, model.parameters()))
    report("ready", images=len(shard), digits=[int(np.sum(digits[shard] == digit)) for digit in range(10)])
    if args.hold:
        sys.stdin.readline()

    for round_number in range(1, args.rounds + 1):
        seen = 0
        for _ in range(LOCAL_STEPS):
            batch = mine.choice(shard, max(1, len(shard) // BATCHES_PER_SHARD))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            seen += len(batch)
        schedule.step()

        before = accuracy()
        if averager is None:
            report("round", round=round_number, accuracy=before)
            continue
        outcome = averager.step(weight=seen)  # the parameters now hold the average
        report(
            "round",
            round=round_number,
            before=before,
            accuracy=accuracy(),
            averaged=outcome.averaged,
            peers=len(outcome.contributors),
            seconds=outcome.seconds,
            bytes=outcome.bytes_sent + outcome.bytes_received,
            reason=outcome.reason,
        )

report("done", accuracy=accuracy())
if args.out:
    vector = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    np.save(args.out.with_suffix(".npy"), vector.numpy())
    args.out.with_suffix(".json").write_text(json.dumps({"accuracy": accuracy(), "images": len(shard)}))

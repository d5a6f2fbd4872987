"""A trainer to be killed: `python e2e_trainer.py SOCKET RUN N_ELEMS VALUE`.

Attaches a float32 vector of VALUEs, says "attached", and then does one step for each line of its standard input; after
each it prints the first element of the vector.
"""

import sys

import numpy as np

from mpd.client import connect

socket, run, n_elems, value = sys.argv[1:]
vector = np.full(int(n_elems), float(value), np.float32)
with connect(socket) as daemon:
    averager = daemon.averager(run, {"x": vector})
    sys.stdout.write("attached\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        averager.step(timeout=20.0)
        sys.stdout.write(f"{vector[0]}\n")
        sys.stdout.flush()

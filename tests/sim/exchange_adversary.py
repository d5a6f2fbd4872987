"""Random rounds: who dies, freezes, is cut off or judged dead, and when, all from one seed."""

import random
from collections.abc import Callable

from sim.exchange_net import ALL, DEADLINE_S, PROGRESS_S, Net, check, make_plans

from mpd.exchange import Ended, Exchange
from mpd.reduce import members_of

FAULT_MIXES = (
    ("crash",),
    ("crash",),
    ("cut",),
    ("crash", "cut"),
    ("freeze",),
    ("crash", "freeze", "cut"),
    ("isolate",),
    ("crash", "hasten"),
    ("complain", "crash"),
    ("accuse", "crash", "cut"),
    ("crash", "cut", "freeze", "isolate", "hasten", "complain", "accuse"),
)
STORM = ("cut", "hasten", "hasten", "hasten", "crash", "freeze", "complain")  # competing coordinators
SIZES = (2, 3, 3, 4, 4, 5, 5, 6, 7, 8)
MAX_STEPS = 20_000


class Run:
    """One random round of 2 to 8 members, some of them slow, outbound-only or of no weight, with up to 9 faults."""

    def __init__(
        self, seed: int, make: Callable[..., Exchange] = Exchange, kinds: tuple[str, ...] | None = None
    ) -> None:
        self.random = r = random.Random(seed)
        n = r.choice(SIZES)
        full = (1 << n) - 1
        inbound = r.randrange(1, full + 1) if r.random() < 0.25 else full
        senders = r.randrange(1, full + 1) if r.random() < 0.2 else full
        reducers = [i for i in members_of(inbound) if r.random() < 0.85] or [members_of(inbound)[0]]
        owners = [o for o in reducers for _ in range(r.randint(1, 3))][:10]
        self.net = Net(make_plans(n, owners, inbound=inbound, senders=senders), make)
        self.kinds = kinds or r.choice(FAULT_MIXES)
        n_faults = r.choice((0, 1, 1, 1, 2, 2, 3, 4))
        if kinds is None and r.random() < 0.3:
            self.kinds, n_faults = STORM, r.randint(3, 9)
        horizon = int((2 * len(owners) * (n - 1) + n * n) * r.choice((1, 1.3, 2)))
        self.faults = sorted((r.randrange(horizon), r.choice(self.kinds)) for _ in range(n_faults))
        self.timers_early = r.random() < 0.2  # timers ring although answers are on their way
        self.lazy = r.random() < 0.5  # sender tasks read memory at the last moment
        self.speed = {pair: r.choice((1, 1, 1, 0.2, 0.02)) for pair in self.net.links}
        self.frozen: dict[int, int] = {}  # member -> step at which it thaws
        self.n_steps = 0
        self.n_crashes = 0
        self.n_lacked_at_crash = 0

    def go(self) -> None:
        """Play the round to its end, then judge it."""
        net, r = self.net, self.random
        while net.up():
            self.n_steps += 1
            check(self.n_steps < MAX_STEPS, "I4: no end")
            if self.faults and self.n_steps >= self.faults[0][0] and len(net.up()) > 1:
                self._fault(self.faults.pop(0)[1])
                continue
            self.frozen = {i: until for i, until in self.frozen.items() if until > self.n_steps}
            awake = [i for i in net.up() if i not in self.frozen]
            if self.timers_early and awake and r.random() < 0.03:
                self._hasten(r.choice(awake))
                continue
            ready = [pair for pair, link in net.links.items() if link and pair[1] in awake]
            if ready:
                self._deliver(*r.choices(ready, [self.speed[pair] for pair in ready])[0])
            elif self.frozen and (r.random() < 0.7 or not self._is_early(awake)):
                self._resolve_freeze()
            else:
                net.tick(min(awake, key=lambda i: (net.members[i].wakeup or 0.0, i)))
        net.check_end()
        self._judge_liveness()
        self._judge_repair()

    def _deliver(self, i: int, j: int) -> None:
        link = self.net.links[i, j]
        if not self.lazy:
            for frame in link.data:
                self.net.read(i, frame)
        self.net.deliver(i, j, self.random.choice(link.lanes()))

    def _is_early(self, awake: list[int]) -> bool:
        """Whether a timer rings before the deadline comes near: nobody stays frozen until then."""
        wakeups = [self.net.members[i].wakeup for i in awake]
        return any(wakeup is not None and wakeup < DEADLINE_S / 2 for wakeup in wakeups)

    def _resolve_freeze(self) -> None:
        """Nothing moves: a frozen member thaws, or everybody else judges it lost."""
        i = self.random.choice(list(self.frozen))
        if self.random.random() < 0.5:
            del self.frozen[i]
            return
        for j in self.net.up():
            if j not in self.frozen and frozenset((i, j)) not in self.net.over:
                self.net.cut(j, i, ALL, ALL)
        self.frozen[i] = self.n_steps

    def _hasten(self, i: int, by_s: float = 0.0) -> None:
        """The clock of one member runs ahead: to its next timer, or so far that others seem slow."""
        now = self.net.clocks[i] + by_s if by_s else self.net.members[i].wakeup or 0.0
        if now < DEADLINE_S / 2:
            self.net.tick(i, now)

    def _fault(self, kind: str) -> None:
        net, r, up = self.net, self.random, self.net.up()
        i = r.choice(up)
        j = r.choice([x for x in up if x != i])
        if kind == "crash":
            self._note_crash(i)
            net.crash(i, lambda n: r.choice((0, n, r.randint(0, n))))
        elif kind == "cut":
            self._cut(i, j)
        elif kind == "isolate":
            for k in up:
                if k != i and k in net.up():
                    self._cut(k, i)
        elif kind == "freeze":
            self.frozen[i] = self.n_steps + r.choice((20, 100, 400, MAX_STEPS))
        elif kind == "hasten":
            self._hasten(i)
        elif kind == "complain":
            self._hasten(i, by_s=r.choice((1.3, 2.8)) * PROGRESS_S)
        elif kind == "accuse":
            self._accuse(i, j)

    def _cut(self, i: int, j: int) -> None:
        if frozenset((i, j)) not in self.net.over:
            link, r = self.net.links[i, j], self.random
            self.net.cut(i, j, r.randint(0, len(link.control)), r.randint(0, len(link.data)))

    def _accuse(self, i: int, j: int) -> None:
        """Member i judges j to be slow, as a sender and as a reducer."""
        member = self.net.members[i]
        if member.ended is None and 2 * (member._group.slow | 1 << j).bit_count() < self.net.n:
            member._group.slow |= 1 << j
            member._group.silent |= 1 << j & member._group.linked
            member._replanner.ask_anew()
            member._drop_senders(1 << j, "accused")
            self._hasten(i, by_s=0.001)

    def _note_crash(self, i: int) -> None:
        self.n_crashes += 1
        survivors = [j for j in self.net.up() if j != i]
        for chunk, (version, writer) in enumerate(self.net.members[i]._agreement.plan.table):
            if writer == i and not all(self.net.members[j].holds(chunk, version) for j in survivors):
                self.n_lacked_at_crash += 1

    def _judge_liveness(self) -> None:
        """I4b: with a redo quorum alive and one member linked to all of it, everyone alive succeeds."""
        net = self.net
        live = [i for i in range(net.n) if i not in net.dead]
        check(all(net.members[i].ended for i in live), "I4: a live member did not end")
        hubs = [i for i in live if all(i == j or frozenset((i, j)) not in net.faulty for j in live)]
        if hubs and len(live) >= net.plan.redo_quorum and net.plan.senders == net.plan.everyone:
            failed = {i: net.members[i].reason for i in live if net.members[i].ended is not Ended.SUCCESS}
            check(not failed, f"I4b: {len(live)} of {net.n} live and are linked, but {failed}")

    def _judge_repair(self) -> None:
        """I8: after one crash only what a survivor lacked travels again."""
        if self.kinds != ("crash",) or self.n_crashes != 1 or self.timers_early or self.net.n == 2:
            return
        sent, n = self.net.sent, self.net.n
        repair = sent["redone piece"] + sent["redone result"] + sent["forwarded result"]
        # A redone result that overtakes its plan is dropped and travels twice.
        bound = 2 * (n - 2) * self.n_lacked_at_crash + sent["too early"]
        check(repair <= bound, f"I8: {repair} records of repair where {bound} are enough")
        check(not sent["duplicate"], "I8: a chunk arrives that is there already")


def simulate(seed: int, make: Callable[..., Exchange] = Exchange, kinds: tuple[str, ...] | None = None) -> Run:
    """Play the round of `seed`. What goes wrong says how to see it again."""
    try:
        run = Run(seed, make, kinds)
        run.go()
    except Exception as error:
        error.add_note(f"again: MPD_SIM_SEEDS={seed}:{seed + 1} pytest tests/sim/test_exchange_sim.py -k rounds")
        raise
    return run

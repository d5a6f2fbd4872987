"""Stories of one round that are told in more than one test, step by step, on real machines."""

from collections.abc import Iterable

from sim.exchange_net import Bytes, Net, make_plans

from mpd.exchange import Ended, Exchange
from mpd.messages import Ask, Done, NewPlan, Prepare, Promise


def machine(n: int, me: int, owners: Iterable[int], **fixed: object) -> tuple[Exchange, Bytes]:
    """A single started machine, whose actions so far are forgotten."""
    plan = make_plans(n, tuple(owners), **fixed)[me]
    vault = Bytes(plan)
    exchange = Exchange(plan, vault, 0.0)
    exchange.start(0.0)
    exchange.take_actions()
    return exchange, vault


def outcomes(net: Net) -> list[list[int] | None]:
    """The masks that each member published, None for those that failed; who has not ended is an error."""
    return [None if result is None else [mask for mask, _ in result] for _, result in sorted(net.published.items())]


def three_plans() -> Net:
    """1 redoes the chunk under plan 1 and holds it; 2 and 0 keep the owner's bytes under plan 2; 0 publishes and dies
    without a word; 1 decides plan 4 before it has read plan 2. Only the highest DONE saves agreement.
    """
    net = Net(make_plans(3, [0]))
    net.data(1, 0)
    net.data(2, 0)  # 0 closes v0 = {0, 1, 2}
    net.cut(1, 0)  # 1 judges 0 dead and prepares plan 1
    net.control(1, 2, Prepare)
    net.control(2, 1, Promise)  # 1 decides: the chunk is redone by 1
    net.tick(2, 1.0)
    net.tick(2)  # 2 has waited long enough: it asks 1 in vain, then coordinates itself
    while Prepare not in net.on_the_way(2, 0):
        net.tick(2)
    net.control(1, 2, NewPlan, Ask)  # plan 1 comes too late, but its Ask is answered
    net.data(2, 1)  # 1 closes v1 = {1, 2} and says DONE(1)
    assert net.members[1].holds(0, 1)
    net.data(0, 2)
    net.control(0, 2, Done)
    net.control(2, 0, Prepare)
    net.control(0, 2, Promise)
    while NewPlan not in net.on_the_way(2, 0):
        net.tick(2)  # the grace time ends without the promise of 1: plan 2 keeps v0
    net.go((2, 0))
    assert net.members[0].ended is Ended.SUCCESS
    net.crash(0)
    while Prepare not in net.on_the_way(2, 1)[:1]:
        net.deliver(2, 1, "control")
    net.control(2, 1, Prepare)
    while Prepare not in net.on_the_way(1, 2):
        net.tick(1)
    net.run()
    return net


def back_to_the_first_version() -> tuple[Exchange, Bytes]:
    """The owner has closed version 0 and holds version 1 now; plan 2 goes back to version 0, which 1 and 2 hold."""
    exchange, vault = machine(3, 0, [0, 2])
    exchange.on_piece(0.0, 1, 0, 0, 4)
    exchange.on_piece(0.0, 2, 0, 0, 16)
    exchange.on_message(0.0, 1, NewPlan(1, 0b110, ((0, 1, 1),), ()))
    exchange.on_result(0.0, 1, 0, 1, 0b110, 20)
    assert vault.slots[0] == 20
    exchange.take_actions()
    exchange.on_message(0.0, 2, NewPlan(2, 0b111, (), ((0, 0b110),)))
    return exchange, vault


def late_plan() -> Exchange:
    """Member 2 of 3 has promised epoch 3 to member 0, and only then is told of plan 1, which redoes the chunk."""
    exchange, _ = machine(3, 2, [0])
    exchange.on_message(0.0, 0, Prepare(3))
    exchange.on_message(0.0, 1, NewPlan(1, 0b110, ((0, 1, 1),), ()))
    return exchange

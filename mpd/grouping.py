"""From the tickets of those who joined to the `Begin` of their round: seats, weights, shards and durations.

The leader computes all of it once and the members take it as it is. What a ticket claims cannot be checked here, only
bounded; who does not fit is left out and named, so that one bad ticket does not cost the others their round.

A line that has swollen while the run grew is cut into groups of its own where that costs nothing (mpd/mass.py). What
its members weigh follows from the whole line, so a claim of several cell-mates stays one, whichever groups they are in.
"""

import random
from collections import Counter
from collections.abc import Mapping

from mpd.elastic import max_line
from mpd.errors import PeerError, RoundFailed
from mpd.grid import Cell, Shape, axis_of, line_of, on_grid, seating
from mpd.ids import ROUND_ID_BYTES, PeerId, show_peer
from mpd.layout import MAX_WEIGHT
from mpd.manifest import MAX_NUMBER
from mpd.mass import MAX_MASS, Shares, cuts, shares
from mpd.messages import MAX_MEMBERS, Begin, Join, Member
from mpd.schedule import chunk_bytes_for, tempered_fractions

MAX_LEFT_OUT = 1024


def compose_begins(
    members: tuple[tuple[PeerId, Join], ...],
    left_out: dict[PeerId, str],
    *,
    shape: Shape,
    n_peers: int,
    exact: bool,
    rng: random.Random,
    progress_s: float,
    payload_bytes: int,
    uploads: Mapping[PeerId, float] | None = None,
    group_size: int = MAX_MEMBERS,
) -> tuple[Begin, ...]:
    """Return the `Begin` of the group, or of each group if the line is cut; the leader's first.

    Args:
        members: each member's ticket, the leader first; its run, slot, terms and epoch count.
        left_out: announced peers that are not members, and why. If there are any in the first round of a cycle, a
            second leader may be closing a second group with them, so the result cannot be certified; in later ones
            the claims that are there, or are not, tell (mpd/mass.py).
        shape: cells per axis of the run's grid, and `n_peers` for how many it was made.
        exact: whether mass moves within a cycle (see mpd/mass.py).
        rng: source of the round id; `random.SystemRandom()` outside tests.
        progress_s: how long a member may deliver nothing while others wait for it.
        payload_bytes: size of the vector.
        uploads: how fast members send, as the leader has measured, in bytes per second; nothing is known of the others.
        group_size: how large groups should be; a line that is much larger is cut.

    Members that can be dialled reduce shards by their bandwidth, the smaller one of what they say about receiving and
    what the leader knows about their sending.

    A ticket that does not stand on the leader's line, or that weighs more than a peer may, is left out. Raises
    RoundFailed if fewer than two members remain, if nobody among them can reduce, or if nobody's weight counts.
    """
    leader = members[0][1]
    misfits = {peer: why for peer, ticket in members if (why := _misfit(ticket, leader, shape, exact))}
    fitting = {peer: ticket for peer, ticket in members if peer not in misfits}
    left_out = left_out | misfits
    if len(fitting) < 2:
        raise RoundFailed("nobody who joined stands on our line of the grid")
    round_id = rng.randbytes(ROUND_ID_BYTES)
    if not any(ticket.inbound for ticket in fitting.values()):
        raise RoundFailed("nobody in the group accepts connections, so nobody can reduce")
    number = _common_number(fitting, shape, exact)
    cells: dict[bytes, Cell] = {peer: ticket.standing.cell for peer, ticket in fitting.items()}
    peers = tuple(map(PeerId, seating(cells, number, n_peers, shape, round_id)))
    share = shares([fitting[peer].standing for peer in peers], number, shape, exact)
    if sum(share.weights) <= 0:
        raise RoundFailed("nobody in the group brings any weight into this round")
    begins_cycle = axis_of(number, shape) == 0
    begins = []
    groups = _groups(peers, fitting, share, group_size)
    for group in groups:
        if len(groups) > 1:  # each has a seat for every coordinate
            round_id = rng.randbytes(ROUND_ID_BYTES)
            group = tuple(map(PeerId, seating({p: cells[p] for p in group}, number, n_peers, shape, round_id)))
        tickets = [fitting[peer] for peer in group]
        places = [peers.index(peer) for peer in group]
        bandwidths = [_bandwidth(fitting[peer], (uploads or {}).get(peer, 0.0)) for peer in group]
        split = tempered_fractions(bandwidths, [ticket.inbound for ticket in tickets])
        begins.append(
            Begin(
                round_id=round_id,
                run=leader.run,
                slot=leader.slot,
                digest=leader.digest,
                epoch=leader.epoch,
                number=number,
                members=tuple(
                    Member(
                        peer,
                        ticket.host,
                        ticket.port,
                        ticket.inbound,
                        share.weights[place],
                        share.heads[place],
                        fraction,
                        ticket.stamp,
                    )
                    for peer, ticket, place, fraction in zip(group, tickets, places, split, strict=True)
                ),
                whole=share.whole and not (left_out and begins_cycle),
                chunk_bytes=chunk_bytes_for(
                    payload_bytes, len(group), min((b for b in bandwidths if b > 0), default=0.0)
                ),
                timeout_s=max(ticket.time_left_s for ticket in tickets),
                progress_s=progress_s,
                left_out={bytes(peer): why for peer, why in list(left_out.items())[:MAX_LEFT_OUT]},
                age=min(MAX_NUMBER, 1 + max(ticket.age for ticket in tickets)),
                parts=len(groups),
                newest=max(ticket.newest for ticket in fitting.values()),
            )
        )
    return tuple(sorted(begins, key=lambda begin: members[0][0] not in {member.peer for member in begin.members}))


def _common_number(tickets: Mapping[PeerId, Join], shape: Shape, exact: bool) -> int:
    """Return the round that the members go on with: the largest number, since whoever is behind has nothing to lose.

    In the midst of an exact cycle they have: what was brought into another cycle weighs nothing. There it is the number
    of most members that bring something, and nobody who is ahead of them, or says so, takes it from them.
    """
    if exact and axis_of(next(iter(tickets.values())).number, shape) != 0:
        brought = Counter(t.number for t in tickets.values() if t.standing.mass > 0 and t.standing.seen == t.number - 1)
        if brought:
            return max(brought, key=lambda number: (brought[number], number))
    return max(ticket.number for ticket in tickets.values())


def _groups(
    peers: tuple[PeerId, ...], tickets: Mapping[PeerId, Join], share: Shares, group_size: int
) -> list[tuple[PeerId, ...]]:
    """Return the groups into which the members of a line are cut; one, wherever a cut would cost something.

    Each has its part of those who can be dialled and of those whose weight counts, so that each can average.
    """
    cap = group_size + 2 if len(peers) > max_line(group_size) else MAX_MEMBERS
    n_groups = cuts(len(peers), share.number, share.shape, cap, MAX_MEMBERS)
    dealt = sorted(range(len(peers)), key=lambda i: (not tickets[peers[i]].inbound, share.weights[i] == 0, i))
    groups = [tuple(peers[i] for i in sorted(dealt[start::n_groups])) for start in range(n_groups)]
    weight = dict(zip(peers, share.weights, strict=True))
    is_able = all(any(tickets[p].inbound and weight[p] > 0 for p in group) for group in groups)
    if is_able:
        return groups
    if len(peers) > MAX_MEMBERS:
        raise RoundFailed(f"{len(peers)} members are more than one group holds, and too few of them can reduce")
    return [peers]


def _misfit(ticket: Join, leader: Join, shape: Shape, exact: bool) -> str:
    """Return why a ticket cannot be part of the leader's group, or an empty string."""
    axis = axis_of(leader.number, shape)
    cell, place, mass = ticket.standing.cell, leader.standing.cell, ticket.standing.mass
    if axis_of(ticket.number, shape) != axis:
        return f"stands at round {ticket.number}, in another phase"
    if not on_grid(cell, shape) or line_of(cell, axis) != line_of(place, axis):
        return "stands on another line of the grid"
    if mass > (most := _most_mass(leader.number, shape, exact)):
        return f"weighs {mass:g}: at most {most:g} expected"
    return ""


def check_weights(begin: Begin, shape: Shape, exact: bool) -> None:
    """Raise PeerError if a member weighs more than a peer may in that round, whatever its leader has made of it."""
    most = _most_mass(begin.number, shape, exact)
    heaviest = max(begin.members, key=lambda member: member.weight)
    if heaviest.weight > most:
        name = show_peer(PeerId(heaviest.peer))
        raise PeerError(f"it begins a round in which {name} weighs {heaviest.weight:g}: at most {most:g} expected")


def _most_mass(number: int, shape: Shape, exact: bool) -> float:
    """Return the most that one member may weigh.

    Mass moves in the later rounds of a cycle only. In any other it is the weight of the peer's own trainers.
    """
    return MAX_MASS if exact and axis_of(number, shape) else MAX_WEIGHT


def _bandwidth(ticket: Join, upload: float) -> float:
    """Return the bandwidth of a member in its slower direction, as far as it is known; 0 if it is not at all."""
    return min((known for known in (ticket.bandwidth, upload) if known > 0), default=0.0)

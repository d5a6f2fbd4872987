"""From the tickets of those who joined to the `Begin` of their round: seats, weights, shards and durations.

The leader computes all of it once and the members take it as it is. What a ticket claims cannot be checked here, only
bounded; who does not fit is left out and named, so that one bad ticket does not cost the others their round.
"""

import random
from collections.abc import Mapping

from mpd.errors import RoundFailed
from mpd.grid import Shape, axis_of, line_of, on_grid, seating
from mpd.ids import ROUND_ID_BYTES, PeerId
from mpd.layout import MAX_WEIGHT
from mpd.manifest import MAX_NUMBER
from mpd.mass import shares
from mpd.messages import Begin, Join, Member
from mpd.schedule import chunk_bytes_for, tempered_fractions

MAX_LEFT_OUT = 1024


def compose_begin(
    members: tuple[tuple[PeerId, Join], ...],
    left_out: dict[PeerId, str],
    *,
    shape: Shape,
    exact: bool,
    rng: random.Random,
    progress_s: float,
    payload_bytes: int,
    uploads: Mapping[PeerId, float] | None = None,
) -> Begin:
    """Return the `Begin` of a group.

    Args:
        members: each member's ticket, the leader first; its run, slot, terms, epoch and number count.
        left_out: announced peers that are not members, and why. If there are any, a second leader may be closing a
            second group with them, so the result cannot be certified.
        shape: cells per axis of the run's grid.
        exact: whether mass moves within a cycle (see mpd/mass.py).
        rng: source of the round id; `random.SystemRandom()` outside tests.
        progress_s: how long a member may deliver nothing while others wait for it.
        payload_bytes: size of the vector.
        uploads: how fast members send, as the leader has measured, in bytes per second; nothing is known of the others.

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
    peers = seating(fitting, round_id)
    tickets = [fitting[PeerId(peer)] for peer in peers]
    if not any(ticket.inbound for ticket in tickets):
        raise RoundFailed("nobody in the group accepts connections, so nobody can reduce")
    bandwidths = [_bandwidth(fitting[peer], (uploads or {}).get(peer, 0.0)) for peer in map(PeerId, peers)]
    split = tempered_fractions(bandwidths, [ticket.inbound for ticket in tickets])
    share = shares([ticket.standing for ticket in tickets], leader.number, shape, exact)
    if sum(share.weights) <= 0:
        raise RoundFailed("nobody in the group brings any weight into this round")
    return Begin(
        round_id=round_id,
        run=leader.run,
        slot=leader.slot,
        digest=leader.digest,
        epoch=leader.epoch,
        number=leader.number,
        members=tuple(
            Member(peer, ticket.host, ticket.port, ticket.inbound, weight, heads, fraction, ticket.stamp)
            for peer, ticket, weight, heads, fraction in zip(
                peers, tickets, share.weights, share.heads, split, strict=True
            )
        ),
        whole=share.whole and not left_out,
        chunk_bytes=chunk_bytes_for(payload_bytes, len(peers), min((b for b in bandwidths if b > 0), default=0.0)),
        timeout_s=max(ticket.time_left_s for ticket in tickets),
        progress_s=progress_s,
        left_out={bytes(peer): why for peer, why in list(left_out.items())[:MAX_LEFT_OUT]},
        age=min(MAX_NUMBER, 1 + max(ticket.age for ticket in tickets)),
    )


def _misfit(ticket: Join, leader: Join, shape: Shape, exact: bool) -> str:
    """Return why a ticket cannot be part of the leader's group, or an empty string."""
    axis = axis_of(leader.number, shape)
    cell, place, mass = ticket.standing.cell, leader.standing.cell, ticket.standing.mass
    if not on_grid(cell, shape) or line_of(cell, axis) != line_of(place, axis):
        return "stands on another line of the grid"
    # Mass moves in the later rounds of a cycle only. In any other it is the weight of the peer's own trainers.
    if mass > MAX_WEIGHT and (axis == 0 or not exact):
        return f"weighs {mass:g}: at most {MAX_WEIGHT:g} expected"
    return ""


def _bandwidth(ticket: Join, upload: float) -> float:
    """Return the bandwidth of a member in its slower direction, as far as it is known; 0 if it is not at all."""
    return min((known for known in (ticket.bandwidth, upload) if known > 0), default=0.0)

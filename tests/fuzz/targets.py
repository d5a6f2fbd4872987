"""Every parser of bytes that others wrote, by name: for `make fuzz`, and for the tests to replay what it found."""

from fuzz import dht, local, machines, peers, sealing, swarm
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    **peers.TARGETS,
    **machines.TARGETS,
    **sealing.TARGETS,
    **dht.TARGETS,
    **local.TARGETS,
    **swarm.TARGETS,
}

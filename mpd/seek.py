"""Where the chunks come from that will not come by themselves.

Forwarding needs no agreement: the same bytes of the same version are right, whoever sends them. So a member that lacks
a chunk whose writer it has lost asks, one member at a time, those who probably hold it.
"""

from mpd.ballot import Plan
from mpd.messages import ChunkVersion
from mpd.reduce import mask_of, members_of
from mpd.rounds import RoundPlan


class Seeker:
    """What I have asked others for, and what can be had from nobody.

    `orphans` are the chunks that no member linked to me can be asked for, `late` those that only members who have
    fallen silent can deliver. Only a new plan helps either.
    """

    def __init__(self, round_plan: RoundPlan) -> None:
        self._round = round_plan
        self._wanted: dict[int, int] = {}  # chunk -> whom I asked
        self._early: dict[int, dict[int, int]] = {}  # chunk -> sender -> version that came before its plan
        self._owed: dict[int, dict[int, int]] = {}  # chunk -> member -> version that it wants from me
        self._returned: set[int] = set()  # chunks for which a plan went back to a version that was sent long ago
        self.orphans: set[int] = set()
        self.late: set[int] = set()

    @property
    def stuck(self) -> bool:
        """True if a chunk is missing that nobody, or nobody in time, will send."""
        return bool(self.orphans or self.late)

    def note_early(self, chunk: int, version: int, sender: int) -> None:
        """`sender` has `version` of `chunk`, which no plan that I know names: it may be wanted soon."""
        self._early.setdefault(chunk, {})[sender] = version

    def owe(self, chunk: int, version: int, member: int) -> None:
        """`member` wants `version` of `chunk`, which I lack: it stands until I get it or `member` wants another."""
        self._owed.setdefault(chunk, {})[member] = version

    def arrived(self, chunk: int, version: int) -> list[int]:
        """Stop seeking `chunk`, and return the members that I owe `version` of it."""
        self._wanted.pop(chunk, None)
        self.orphans.discard(chunk)
        self.late.discard(chunk)
        owed = self._owed.get(chunk, {})
        served = [member for member, wanted in owed.items() if wanted == version]
        for member in served:
            del owed[member]
        return served

    def replanned(self, chunk: int, *, is_new: bool) -> None:
        """The plan names another version of `chunk`: a new one, which its writer will send, or one from the past."""
        self._wanted.pop(chunk, None)
        if is_new:
            self._returned.discard(chunk)
        else:
            self._returned.add(chunk)

    def lost(self, member: int) -> None:
        """`member` delivers nothing any more."""
        self._wanted = {chunk: asked for chunk, asked in self._wanted.items() if asked != member}

    def supplier(self, chunk: int, writer: int) -> int:
        """Return the member from whom `chunk` is to come at present."""
        return self._wanted.get(chunk, writer)

    def seek(
        self, lacking: list[int], plan: Plan, holders: int, prompt: int, silent: int
    ) -> dict[int, list[ChunkVersion]]:
        """Return what to want now, by member, and find out what is an orphan or late.

        `lacking` are the chunks that I neither hold nor write, `holders` masks members that hold everything; `prompt`
        and `silent` mask the members linked to me, by whether they have delivered lately.
        """
        self.orphans.clear()
        self.late.clear()
        wants: dict[int, list[ChunkVersion]] = {}
        for chunk in lacking:
            asked = self._wanted.get(chunk)
            if asked is not None and prompt >> asked & 1:
                continue
            sources, by_itself = self._sources(chunk, plan, holders, prompt)
            if not sources and asked is None:
                sources, by_itself = self._sources(chunk, plan, holders, silent)
            if not sources or sources & silent:
                (self.late if sources or asked is not None else self.orphans).add(chunk)
            if sources and not by_itself:
                candidates = members_of(sources)
                source = candidates[(chunk + self._round.me) % len(candidates)]
                self._wanted[chunk] = source
                wants.setdefault(source, []).append((chunk, plan.table[chunk][0]))
        return wants

    def _sources(self, chunk: int, plan: Plan, holders: int, among: int) -> tuple[int, bool]:
        """Mask of the members in `among` to ask for `chunk`, or its writer and True if it will come unasked."""
        version, writer = plan.table[chunk]
        writer_bit = 1 << writer & among
        seen = self._early.get(chunk, {})
        early = mask_of(sender for sender, its_version in seen.items() if its_version == version) & among
        if not early and writer_bit and chunk not in self._returned:
            return writer_bit, True
        holders_bits = (plan.holders.get(chunk, 0) | holders) & among
        # The coordinator saw the writer alive when it decided: it has the chunk by now, or knows better.
        coordinator_bit = 0
        if plan.epoch and plan.alive >> writer & 1:
            coordinator_bit = 1 << plan.epoch % self._round.n_members & among
        return early or holders_bits or writer_bit or coordinator_bit, False

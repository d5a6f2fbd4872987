"""What `mpd chaos` prints: the findings for people, and the same as JSON."""

from collections.abc import Sequence
from typing import Any

from .chaos_judge import PROMISES, Findings, Recovery, Seen, middle, shown
from .chaos_plan import KINDS, Fault, Settings


def as_json(seen: Seen, findings: Findings) -> dict[str, Any]:
    """Return the report as plain values. Durations are seconds, rates rounds per minute."""
    chosen = seen.settings
    return {
        "held": findings.held,
        "peers": chosen.peers,
        "seed": chosen.seed,
        "size_bytes": chosen.size_bytes,
        "minutes": round((seen.chaos[1] - seen.chaos[0]) / 60, 2),
        "train_s": chosen.train_s,
        "every_s": list(chosen.every_s),
        "breaches": {promise: shown(sentences) for promise, sentences in findings.breaches.items()},
        "good_rounds": findings.good_rounds,
        "rounds_per_minute": round(findings.rate, 2),
        "fault_free_rounds_per_minute": round(findings.quiet_rate, 2),
        "kept": None if findings.kept is None else round(findings.kept, 4),
        "longest_gap_s": round(findings.longest_gap_s, 3),
        "results": findings.n_results,
        "steps_not_averaged": findings.n_failed,
        "faults": [
            {
                "at_s": one.happened.fault.at_s,
                "kind": one.happened.fault.kind,
                "machine": one.happened.fault.target,
                "lasts_s": one.happened.fault.lasts_s,
                "stall_s": round(one.stall_s, 3),
                "back_s": None if one.back_s is None else round(one.back_s, 3),
            }
            for one in findings.recoveries
        ],
    }


def as_text(seen: Seen, findings: Findings) -> str:
    """Return the report for a terminal."""
    minutes = (seen.chaos[1] - seen.chaos[0]) / 60
    kept = "" if findings.kept is None else f": {findings.kept:.1%} kept"
    lines = [
        f"{findings.good_rounds} good rounds in {minutes:.1f} min with {len(seen.happened)} faults, "
        f"{findings.rate:.1f} a minute; without faults {findings.quiet_rate:.1f}{kept}",
        f"longest time between two good rounds: {findings.longest_gap_s:.2f} s",
        f"{findings.n_results} results in all, {findings.n_failed} steps that did not average",
        "",
        *_promises(findings),
        "",
        *_table(findings.recoveries),
    ]
    return "\n".join(lines)


def show_plan(settings: Settings, plan: Sequence[Fault]) -> str:
    """Return one line of what is about to happen."""
    low, high = settings.every_s
    every = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return (
        f"{settings.peers} machines, {settings.size_bytes / 2**20:g} MiB each, training {settings.train_s:g} s between "
        f"steps; {settings.chaos_s / 60:g} min with a fault every {every} s ({len(plan)} in all, seed {settings.seed})"
        f", and {settings.quiet_s:g} s without before and after"
    )


def show_fault(fault: Fault) -> str:
    """Return the line that announces a fault."""
    minutes, seconds = divmod(fault.at_s, 60)
    return f"{int(minutes):3}:{seconds:04.1f}  machine {fault.target}: {fault.kind} for {fault.lasts_s:.1f} s"


def _promises(findings: Findings) -> list[str]:
    lines = []
    for promise, meaning in PROMISES.items():
        breaches = findings.breaches[promise]
        lines.append(f"{promise}  {'BROKEN' if breaches else 'held  '}  {meaning}")
        lines += [f"            {sentence}" for sentence in shown(breaches)]
    return lines


def _table(recoveries: Sequence[Recovery]) -> list[str]:
    """Say for each kind of fault what it cost the others and when its machine was back, median and worst."""
    lines = [f"{'fault':<9}{'times':>6}   {'longest time between good rounds':<36}{'its machine is back after':<30}"]
    for kind in KINDS:
        chosen = [one for one in recoveries if one.happened.fault.kind == kind]
        if chosen:
            backs = [one.back_s for one in chosen if one.back_s is not None]
            back = f"{middle(backs):.2f} s, worst {max(backs):.2f} s" if backs else "-"
            never = len(chosen) - len(backs)
            back += f", {never} x not at all" if never else ""
            stalls = [one.stall_s for one in chosen]
            stall = f"{middle(stalls):.2f} s, worst {max(stalls):.2f} s"
            lines.append(f"{kind:<9}{len(chosen):>6}   {stall:<36}{back}")
    return lines

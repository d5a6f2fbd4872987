"""Search for bytes that a parser cannot take, guided by the branches that they reach.

    python tests/fuzz/run.py                                    # all targets, 10 seconds each
    python tests/fuzz/run.py --seconds 600 --target invite      # one of them, longer
    python tests/fuzz/run.py --target invite --input FILE       # one input, as the tests replay it
    python tests/fuzz/run.py --keep                             # renew the kept corpus from what was found

Each target runs in a process of its own, with mpd instrumented by atheris (libFuzzer for Python). What it finds stays
in build/fuzz/ and is where the next search begins, so short searches add up. A finding is an exception that blames
nobody, a second of processor time, or too much memory; it ends that target's search, and the others go on.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import click

TESTS = Path(__file__).resolve().parent.parent
CORPUS = TESTS / "fuzz" / "corpus"
FOUND = Path("build/fuzz")
MAX_MEMORY_MIB = 1024
MAX_WALL_S = 20  # for one input; that it takes little processor time is checked by the target
MAX_KEPT = 60
MAX_KEPT_BYTES = 1024
NO_ATHERIS = "atheris is not installed: it has wheels for Linux on x86-64 and CPython 3.11 to 3.13 only"

sys.path[0] = str(TESTS)  # what tests share is imported from there, as pytest does


@click.command()
@click.option("--seconds", default=10, show_default=True, help="How long to search, per target.")
@click.option("--target", "names", multiple=True, metavar="NAME", help="Only this target; may be given several times.")
@click.option("--input", "file", type=click.Path(path_type=Path, exists=True), help="Try this input of one target.")
@click.option("--keep", is_flag=True, help="Search nothing: choose the inputs that the tests replay.")
@click.option("--child", is_flag=True, hidden=True)
def main(seconds: int, names: tuple[str, ...], file: Path | None, keep: bool, child: bool) -> None:
    """Search for bytes that a parser cannot take."""
    if child:
        search(names[0], seconds)
        return
    from fuzz.targets import TARGETS

    unknown = set(names) - set(TARGETS)
    if unknown or (file and len(names) != 1):
        raise click.UsageError(f"--target is one of {', '.join(TARGETS)}")
    if file:
        accepted = TARGETS[names[0]].accepts(file.read_bytes())
        click.echo(f"{names[0]}: {'accepted' if accepted else 'refused'}, as it should be")
        return
    chosen = names or tuple(TARGETS)
    if keep:
        for name in chosen:
            renew(name)
        return
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException(NO_ATHERIS)
    n_findings = sum(not run(name, seconds) for name in chosen)
    if n_findings:
        raise click.ClickException(f"{n_findings} of {len(chosen)} targets have a finding")


# ------------------------------------------------------------------------------------------------------------ searching


def run(name: str, seconds: int) -> bool:
    """Search one target in a process of its own, say how it went, and return whether nothing was found."""
    from fuzz.targets import TARGETS

    folder = FOUND / name
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    save(folder / "inputs", TARGETS[name].seeds())
    command = [sys.executable, __file__, "--child", "--target", name, "--seconds", str(seconds)]
    # A search writes files by the thousand, and ends without cleaning up.
    with (
        open(folder / "log", "w+", encoding="utf-8", errors="replace") as log,
        tempfile.TemporaryDirectory(prefix="mpd-fuzz-", dir="/dev/shm") as rubbish,
    ):
        place = {**os.environ, "TMPDIR": rubbish}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=place, check=False).returncode
        log.seek(0)
        text = log.read()
    click.echo(f"{name:20} {figures(text)}")
    if code:
        report(name, text)
    return code == 0


def search(name: str, seconds: int) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["mpd"]):
        from fuzz.targets import TARGETS
    target, folder = TARGETS[name], FOUND / name
    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_bytes}",
        f"-timeout={MAX_WALL_S}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}",
        f"-artifact_prefix={folder}/finding-",
        "-print_final_stats=1",
    ]
    places = [str(place) for place in (folder / "inputs", CORPUS / name) if place.is_dir()]

    def one_input(data: bytes) -> None:
        target.accepts(data)

    atheris.Setup([sys.argv[0], *flags, *places], one_input)
    atheris.Fuzz()


def figures(log: str) -> str:
    """Return how much was tried and reached, from libFuzzer's output."""
    progress = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    n_tried = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    if not (progress and n_tried):
        return "did not come to an end"
    branches, _, n_inputs = progress[-1]
    return f"{int(n_tried[1]):>9,} inputs tried, {n_inputs:>4} kept, {branches:>5} branches"


def report(name: str, log: str) -> None:
    """Show a finding, and how to see it again."""
    raised = re.search(r"=== Uncaught Python exception: ===\n(.*?)\n==\d+==", log, re.DOTALL)
    lines = raised[1].splitlines() if raised else log.splitlines()[-15:]
    click.echo("\n".join(f"    {line}" for line in lines))
    written = re.search(r"Test unit written to (\S+)", log)
    if written:
        click.echo(f"    again: {sys.executable} {sys.argv[0]} --target {name} --input {written[1]}")
    else:
        click.echo(f"    the whole story is in {FOUND / name / 'log'}")


# ------------------------------------------------------------------------------------------------------ the kept corpus


def save(folder: Path, inputs: Iterable[bytes]) -> None:
    """Write each of `inputs` to a file that is named after its content."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def renew(name: str) -> None:
    """Replace the kept inputs of a target, findings aside, by a few small ones that reach what all known ones reach.

    Set cover, greedily (Chvatal, 1979): again and again the input that adds most for its size.
    """
    kept, found = (sorted(place.glob("*")) for place in (CORPUS / name, FOUND / name / "inputs"))
    findings = [path for path in kept if path.name.startswith("finding-")]
    known = [path.read_bytes() for path in (*kept, *found)]  # of two that are as good, the one that is kept stays
    reached = {data: reach(name, data) for data in known if len(data) <= MAX_KEPT_BYTES}
    everything = frozenset[object]().union(*reached.values())
    missing = everything.difference(*(reach(name, path.read_bytes()) for path in findings))
    chosen: list[bytes] = []
    while missing and len(chosen) < MAX_KEPT:
        best = max(reached, key=lambda data: len(reached[data] & missing) / (len(data) + 20))
        missing -= reached.pop(best)
        chosen.append(best)
    for path in set(kept) - set(findings):
        path.unlink()
    save(CORPUS / name, chosen)
    shares = f"reach {len(everything) - len(missing)} of {len(everything)}"
    click.echo(f"{name:20} {len(chosen):>3} of {len(set(known))} inputs, {sum(map(len, chosen)):>6} bytes, {shares}")


def reach(name: str, data: bytes) -> frozenset[object]:
    """Return what an input makes mpd do: pairs of lines that run after each other, and the words of a refusal."""
    from fuzz.targets import TARGETS

    pairs: set[object] = set()
    before: dict[int, int] = {}

    def follow(frame: FrameType, event: str, _argument: object) -> Any:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("mpd."):
            return None
        pairs.add((module, before.get(id(frame), frame.f_code.co_firstlineno), frame.f_lineno))
        if event == "return":
            before.pop(id(frame), None)
        else:
            before[id(frame)] = frame.f_lineno
        return follow

    target = TARGETS[name]
    sys.settrace(follow)
    try:
        pairs.add(type(target.parse(data)).__name__)
    except target.blame as error:
        pairs.add(re.sub(r"[0-9].*|['\"`].*", "", str(error)))
    finally:
        sys.settrace(None)
    return frozenset(pairs)


if __name__ == "__main__":
    main()

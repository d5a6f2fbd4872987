"""The rules of the three rooms, held by a machine: who may import whom, who may touch what, and what is tested.

Strategy: read the sources, never run them. One parsed `Module` per file; each rule is one test over all of them, and a
failure names the file, the line and the rule. Only the last word on the client is spoken by an interpreter: what a
trainer process really loads.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The core is a straight line: a file may import only files that stand before it.
LINE = (
    "errors",
    "ids",
    "vocabulary",
    "identity",
    "revocations",
    "invites",
    "admission",
    "config",
    "grid",
    "elastic",
    "layout",
    "manifest",
    "mass",
    "meetings",
    "grid_arrays",
    "mass_arrays",
    "schedule",
    "deadlines",
    "reduce",
    "robust",
    "codecs",
    "wire",
    "seal",
    "control",
    "state_file",
    "state_messages",
    "messages",
    "election",
    "fetch",
    "records",
    "roll",
    "matchmaking",
    "grouping",
    "rounds",
    "tempo",
    "ballot",
    "collect",
    "seek",
    "group",
    "chunks",
    "agreement",
    "replan",
    "exchange",
    "quantities",
    "costs",
    "pricing",
    "timeline",
    "findings",
    "doctor",
    "mixing",
    "policies",
    "overlays",
    "theory",
    "simulate",
    "advise",
    "paper",
    "plots",
    "show",
    "show_simulation",
    "cli_options",
    "cli_swarm",
    "cli_doctor",
    "cli_chaos",
    "cli_advise",
    "cli_simulate",
    "cli",
)
COMMANDS = {"cli_swarm", "cli_doctor", "cli_chaos", "cli_advise", "cli_simulate", "cli"}
RIM = {"show", "show_simulation", "plots", "cli_options", *COMMANDS}  # they meet people: a terminal, files, exit codes

CORE_PACKAGES = {"numpy", "msgspec", "zstandard", "cryptography"}
RIM_PACKAGES = {"click", "rich", "trio", "matplotlib"}
DAEMON_PACKAGES = {"trio", "numpy", "msgspec", "cryptography", "kademlia", "rpcudp"}
CLIENT_PACKAGES = {"numpy", "torch"}

# The core gets time, randomness and bytes as arguments. It never waits, and it never looks around.
NOT_IN_THE_CORE = {
    "asyncio", "concurrent", "contextvars", "logging", "multiprocessing", "os", "queue", "sched", "secrets",
    "select", "selectors", "signal", "socket", "socketserver", "ssl", "subprocess", "threading", "time",
}  # fmt: skip

ONLY_THE_DHT = {"kademlia", "rpcudp", "asyncio"}
LINK_FILES = {"links", "peers", "ports", "channels", "handshake", "admission", "faults"}
LOCAL_FILES = {"clients", "memory"}
INTERNET = {
    "AF_INET", "AF_INET6", "create_connection", "create_server", "open_ssl_over_tcp_stream", "open_tcp_listeners",
    "open_tcp_stream", "serve_tcp",
}  # fmt: skip
THIS_MACHINE = {"AF_UNIX", "memfd_create", "mmap", "open_unix_socket", "recv_fds", "send_fds"}

# Real daemons and real sockets live on real time; everything else has a clock of its own.
MAY_SLEEP = ("tests/e2e", "tests/bench/", "tests/fuzz/")  # the last one only gives way

MOCK_CLOCKS = {"autojump_clock", "jumping_clock"}

RUNS_FOREIGN_CODE = {"marshal", "pickle", "shelve", "dill", "cloudpickle", "joblib"}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is absolute or starts with dots, `lazy` means inside a function."""

    module: str
    line: int
    lazy: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: Path
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.stem

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    def imports(self) -> Iterator[Import]:
        lazy = {
            id(inner)
            for outer in ast.walk(self.tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(outer)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, id(node) in lazy)
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                # `from mpd import wire` imports a file, `from mpd.wire import frame` a name in it.
                names = [f"mpd.{alias.name}" for alias in node.names] if base == "mpd" else [base]
                for name in names:
                    yield Import(name, node.lineno, id(node) in lazy)

    def words(self) -> Iterator[tuple[str, int]]:
        """Every name and attribute that the code mentions, with its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                yield node.id, node.lineno
            elif isinstance(node, ast.Attribute):
                yield node.attr, node.lineno
            elif isinstance(node, ast.ImportFrom | ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno

    def calls(self) -> Iterator[tuple[str, int]]:
        """Every call, as the dotted text of what is called, with its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node.lineno


@functools.cache
def modules(folder: str) -> tuple[Module, ...]:
    found = sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
    return tuple(Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in found)


def rooms() -> tuple[Module, ...]:
    return modules("mpd") + modules("daemon") + modules("client")


def everything() -> tuple[Module, ...]:
    return rooms() + modules("tests") + modules("docs")


def report(broken: list[str], rule: str) -> None:
    assert not broken, "\n".join([rule, *(f"  {line}" for line in broken)])


# -------------------------------------------------------------------------------------------------------------- imports


def test_the_line_names_exactly_the_files_of_the_core() -> None:
    files = {module.name for module in modules("mpd")} - {"__init__"}
    assert files == set(LINE), (
        f"mpd/ and the straight line in {Path(__file__).name} differ: "
        f"not in the line: {sorted(files - set(LINE))}; not in mpd/: {sorted(set(LINE) - files)}"
    )


def test_the_core_is_a_straight_line() -> None:
    broken = []
    for module in modules("mpd"):
        before = set(LINE[: LINE.index(module.name)]) if module.name in LINE else set()
        for found in module.imports():
            if found.module.startswith("."):
                broken.append(f"{module.at(found.line)} imports {found.module}: write mpd.x in the core")
            elif found.package == "mpd" and module.name not in COMMANDS:
                target = found.module.split(".")[1] if "." in found.module else ""
                if target not in before and target != "__version__":
                    broken.append(f"{module.at(found.line)} imports {found.module}, which does not stand before it")
    report(broken, "a file of the core imports only files before it in LINE")


def test_the_command_line_opens_the_other_rooms_lazily() -> None:
    broken = [
        f"{module.at(found.line)} imports {found.module} at the top"
        for module in modules("mpd")
        if module.name in COMMANDS
        for found in module.imports()
        if found.module.startswith(("mpd.daemon", "mpd.client", "mpd.show", "mpd.simulate", "mpd.plots", "trio"))
        and not found.lazy
    ]
    report(broken, "the command line imports what is large inside the command that needs it")


def test_only_plots_know_matplotlib() -> None:
    broken = [
        f"{module.at(found.line)} imports {found.module}"
        for module in rooms()
        for found in module.imports()
        if found.package == "matplotlib" and (module.name != "plots" or not found.lazy)
    ]
    report(broken, "matplotlib is an extra: only mpd/plots.py imports it, inside the function that needs it")


@pytest.mark.parametrize(
    ("room", "packages"),
    [
        ("mpd", CORE_PACKAGES | RIM_PACKAGES),
        ("daemon", DAEMON_PACKAGES),
        ("client", CLIENT_PACKAGES),
    ],
)
def test_each_room_uses_only_its_own_packages(room: str, packages: set[str]) -> None:
    broken = [
        f"{module.at(found.line)} imports {found.module}"
        for module in modules(room)
        for found in module.imports()
        if not found.module.startswith(".")
        and found.package not in sys.stdlib_module_names
        and found.package not in packages | {"mpd"}
    ]
    report(broken, f"{room}/ may import the standard library, mpd and {', '.join(sorted(packages))}")


def test_the_core_never_waits_and_never_looks_around() -> None:
    broken = [
        f"{module.at(found.line)} imports {found.module}"
        for module in modules("mpd")
        if module.name not in RIM
        for found in module.imports()
        if found.package in NOT_IN_THE_CORE | RIM_PACKAGES
    ]
    # A generator with a given seed is a computation; the module's own generator, seeded by the system, is not.
    broken += [
        f"{module.at(line)} calls {called}"
        for module in modules("mpd")
        for called, line in module.calls()
        if called.startswith("random.") and called != "random.Random"
    ]
    report(broken, "mpd/ computes: time, randomness, the environment and bytes are arguments")


def test_heavy_packages_come_late_in_the_core() -> None:
    broken = [
        f"{module.at(found.line)} imports msgspec at the top"
        for module in modules("mpd")
        for found in module.imports()
        if found.package == "msgspec" and not found.lazy
    ]
    report(broken, "msgspec comes with the first message, so that a trainer may import mpd.client without it")


@pytest.mark.parametrize("room", ["daemon", "client"])
def test_imports_point_only_at_the_core(room: str) -> None:
    broken = []
    for module in modules(room):
        for found in module.imports():
            if found.module.startswith(".."):
                broken.append(f"{module.at(found.line)} imports {found.module}: write mpd.x for the core")
            elif found.module.startswith(("mpd.daemon", "mpd.client", "mpd.cli")) or found.package in {
                "daemon",
                "client",
            }:
                broken.append(f"{module.at(found.line)} imports {found.module}")
    report(broken, f"{room}/ imports its own files as .x and of mpd only the core")


def test_only_the_dht_knows_kademlia_and_asyncio() -> None:
    broken = [
        f"{module.at(found.line)} imports {found.module}"
        for module in rooms()
        if not (module.path.parent.name == "daemon" and module.name.startswith("dht"))
        for found in module.imports()
        if found.package in ONLY_THE_DHT
    ]
    report(broken, "only daemon/dht*.py imports kademlia, rpcudp and asyncio")


def test_a_trainer_loads_only_the_standard_library_and_mpd() -> None:
    probe = "import sys; before = set(sys.modules); import mpd.client; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=True, cwd="/")
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    foreign = loaded - set(sys.stdlib_module_names) - {"mpd"}
    assert "mpd" in loaded
    assert not foreign, f"importing mpd.client also loads {sorted(foreign)}"
    assert "mpd.daemon" not in done.stdout.split()


# ------------------------------------------------------------------------------------------------- who may touch what


def test_only_links_and_the_dht_know_sockets_between_machines() -> None:
    broken = [
        f"{module.at(line)} uses {word}"
        for module in rooms()
        if module.name not in LINK_FILES and not module.name.startswith("dht")
        for word, line in module.words()
        if word in INTERNET
    ]
    report(broken, f"only daemon/dht*.py and {', '.join(sorted(LINK_FILES))} open sockets to other machines")


def test_only_clients_and_memory_know_the_local_socket_and_shared_memory() -> None:
    broken = [
        f"{module.at(line)} uses {word}"
        for module in modules("daemon")
        if module.name not in LOCAL_FILES
        for word, line in module.words()
        if word in THIS_MACHINE and (module.name, word) != ("tls", "memfd_create")  # ssl reads keys from files only
    ]
    report(broken, f"in daemon/ only {', '.join(sorted(LOCAL_FILES))} know the Unix socket and shared memory")


def test_nothing_reads_the_environment_but_the_rim() -> None:
    broken = [
        f"{module.at(line)} uses {word}"
        for module in modules("mpd") + modules("daemon")
        if module.name not in ("cli", "cli_options")
        for word, line in module.words()
        if word in {"environ", "getenv"}
    ]
    report(broken, "flags and environment are read once, in mpd/cli*.py (and in client/ for the socket's place)")


def test_no_bytes_become_code() -> None:
    broken = []
    for module in everything():
        for found in module.imports():
            if found.package in RUNS_FOREIGN_CODE:
                broken.append(f"{module.at(found.line)} imports {found.module}")
        for called, line in module.calls():
            if called in {"eval", "exec", "torch.load", "torch.save", "yaml.load"}:
                broken.append(f"{module.at(line)} calls {called}")
    report(broken, "nothing in the tree unpickles, evaluates or loads code from data")


# ------------------------------------------------------------------------------------------------------------- tests


def test_every_module_has_its_test_file() -> None:
    broken = []
    for room, tests in (("mpd", "core"), ("daemon", "daemon"), ("client", "client")):
        for module in modules(room):
            test = ROOT / "tests" / tests / f"test_{module.name}.py"
            if module.name != "__init__" and not test.exists():
                broken.append(f"{module.path.relative_to(ROOT)} has no {test.relative_to(ROOT)}")
    report(broken, "every module has a test file of its own")


def test_tests_do_not_sleep() -> None:
    broken = [
        f"{module.at(line)} calls {called}"
        for module in modules("tests")
        if not str(module.path.relative_to(ROOT)).startswith(MAY_SLEEP)
        for called, line in module.calls()
        if called in {"time.sleep", "asyncio.sleep"} or (called == "trio.sleep" and not _on_a_mock_clock(module, line))
    ]
    report(broken, f"outside {', '.join(MAY_SLEEP)} time is a mock clock or an argument")


def _on_a_mock_clock(module: Module, line: int) -> bool:
    """True if `line` lies in a test that takes one of `MOCK_CLOCKS`, or in a helper of a file with such tests."""
    functions = [node for node in module.tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    clocked = [node for node in functions if MOCK_CLOCKS & {arg.arg for arg in node.args.args}]
    around = next((node for node in functions if node.lineno <= line <= (node.end_lineno or 0)), None)
    return around in clocked if around and around.name.startswith("test_") else bool(clocked)


def test_no_test_is_excused() -> None:
    broken = [
        f"{module.at(line)} uses {word}"
        for module in modules("tests")
        for word, line in module.words()
        if word in {"xfail", "flaky"}
    ]
    report(broken, "no xfail and no retry until green: a flaky test is a failing test")


def test_every_module_says_what_it_is_for() -> None:
    broken = [module.at(1) for module in everything() if not ast.get_docstring(module.tree)]
    report(broken, "every file opens with a docstring that tells its strategy")

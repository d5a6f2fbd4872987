"""Write the table of the fault matrix into docs/reliability.md: `python tests/fault_table.py`.

Reads build/fault_matrix.json, which a full run of tests/e2e/test_fault_matrix.py (`make soak`) has left, and replaces
what stands between the two marks in the page.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fault matrix: begin -->", "<!-- fault matrix: end -->"
TITLES = {"kill": "SIGKILL", "freeze": "SIGSTOP, SIGCONT", "reset": "reset", "hole": "black hole", "error": "exception"}


def table(results: list[dict[str, Any]]) -> str:
    """Return the matrix in Markdown: what a full run has shown, one line for each point and role."""
    cells = {(result["point"], result["role"], result["action"]): result for result in results}
    places = dict.fromkeys((result["point"], result["role"]) for result in results)
    lines = [
        f"| point | role | {' | '.join(TITLES.values())} |",
        "|---|---|" + "---|" * len(TITLES),
        *(
            f"| {point} | {role} | {' | '.join(_words(cells[point, role, action]) for action in TITLES)} |"
            for point, role in places
        ),
    ]
    return "\n".join(lines)


def _words(result: dict[str, Any]) -> str:
    if result["objections"]:
        return f"**failed**: {result['objections'][0]}"
    if not result["struck"]:
        return "cannot occur"
    return f"{result['slowest_s']:.1f} s, {result['averaged']}/{result['survivors']}, {result['victim']}"


def main() -> None:
    results = json.loads((ROOT / "build" / "fault_matrix.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        sys.exit(f"{PAGE} has no place for the table: {BEGIN} and {END} expected")
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

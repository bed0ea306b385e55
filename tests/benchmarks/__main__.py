"""All benchmarks, or those that are named, one after the other, and one table of ratios at the end.

    python -m tests.benchmarks [NAME ...] [--size smoke|small|full] [--rounds N]

On SQLite, or with DATABASE_URL on PostgreSQL: each makes a database of its own there and drops it. Ends with 1 when one
of them fails; a goal that is missed is told and fails nothing, because figures depend on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measuring import RESULTS, Figure, options, table

HELP = ("__init__", "__main__", "measuring", "people", "provider")
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HELP)


def main() -> int:
    parser = options(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all without one")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known are {', '.join(NAMES)}.")
    more = ["--rounds", str(chosen.rounds)] if chosen.rounds else []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        for name in chosen.names or NAMES:
            sys.stdout.write(f"== {name}\n")
            sys.stdout.flush()
            command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--size", chosen.size, *more]
            if subprocess.run(command, env={**os.environ, RESULTS: str(results)}, check=False).returncode:
                failed.append(name)
        figures = [Figure(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
    sys.stdout.write(f"== all\n{table(figures)}")
    if failed:
        sys.stdout.write(f"Failed: {', '.join(failed)}.\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""Each benchmark still runs, in a size that says nothing about speed. Figures are for who asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.measuring import RESULTS, Figure, ratio, table


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_tells_its_ratios(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--size", "smoke", "--rounds", "1"]
    done = subprocess.run(
        command, env={**os.environ, RESULTS: str(results)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = [Figure(**json.loads(line)) for line in results.read_text().splitlines()]
    assert figures
    assert all(figure.ratio >= 0 for figure in figures)
    assert table(figures) in done.stdout


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio([10, 20, 90], [10, 10, 10]) == 2
    figure = Figure(goal="G1", what="a", hub=1, yardstick=2, unit="s", ratio=0.5, at_least=0.7)
    assert (figure.reached, figure.aim) == ("no", "≥ 0.7")
    assert Figure(goal="G6", what="a", hub=1, yardstick=2, unit="s", ratio=1.2, at_most=1.3).reached == "yes"

"""The notebooks, and how tests execute them."""

import secrets
from pathlib import Path

from helpers import run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BY_NUMBER = {path.name[:2]: path for path in NOTEBOOKS}


def execute(numbers, output, **parameters):
    """Run notebooks by number; returns their results. Fails with the first error."""
    notebooks = [BY_NUMBER[number] for number in numbers.split()]
    outcomes = run.run_notebooks(notebooks, parameters, Path(output) / secrets.token_hex(4))
    assert not [outcome.error for outcome in outcomes if outcome.status != "ok"]
    return {name: value for outcome in outcomes for name, value in outcome.results.items()}

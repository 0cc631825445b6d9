"""Single cells of a notebook, for tests of what a page defines and does not export."""

import importlib
import re

import nbformat

from executed import BY_NUMBER


def run_cells(page, *texts, names=None):
    """Run the code cells of a page with these texts, after its imports, with these names; returns all names."""
    cells = [cell.source for cell in nbformat.read(BY_NUMBER[page], as_version=4).cells if cell.cell_type == "code"]
    module = re.search(r"default_exp (\w+)", cells[0])[1]
    names = {} if names is None else names
    names |= vars(importlib.import_module(f"helpers.chapters.{module}")) | names
    for text in (cells[2], *texts):  # cells[1] are the imports of the module
        [source] = [source for source in cells if text in source]
        exec(source, names)
    return names

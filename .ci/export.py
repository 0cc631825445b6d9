"""Write helpers/chapters/*.py from the notebooks' `#| export` cells (nbdev). A folder as argument: of another checkout."""

import os
import sys
from pathlib import Path

from nbdev.export import nb_export
from nbdev.maker import ModuleMaker


def make_module(**options):
    return ModuleMaker(**options | {"is_new": True})  # a page may export to two modules, and each is written anew


os.chdir(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)  # the header has the notebook's path
for notebook in sorted(Path("notebooks").glob("[0-9][0-9]*_*.ipynb")):
    nb_export(notebook, lib_path="helpers/chapters", mod_maker=make_module, solo_nb=True)

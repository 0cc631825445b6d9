"""Write helpers/chapters/*.py from the notebooks' `#| export` cells (nbdev). A folder as argument: of another checkout."""

import os
import sys
from pathlib import Path

from nbdev.export import nb_export

os.chdir(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)  # the header has the notebook's path
for notebook in sorted(Path("notebooks").glob("[0-9][0-9]*_*.ipynb")):
    nb_export(notebook, lib_path="helpers/chapters", solo_nb=True)

"""python -m helpers run | rent | bot: the commands; each says more with --help."""

import importlib
import sys

COMMANDS = {
    "run": "helpers.chapters.processes",
    "rent": "helpers.chapters.rent",
    "bot": "helpers.chapters.telegram_bot",
}

if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit(__doc__)
sys.exit(importlib.import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:]))  # imports no other command

"""The command line: `mechreward demo`, `improve`, `train`, `report`, `sae`, `pack`, `info`; one file a verb.

Imports every room and is imported by none. Exit codes: 0 done, 1 a gate did not pass, 2 bad input (one sentence on what
to change).
"""

from mechreward.cli.main import main

__all__ = ["main"]

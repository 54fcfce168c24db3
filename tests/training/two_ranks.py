"""Run by `test_training_processes` on each of two processes: what both do, one after the other, with one start."""

from __future__ import annotations

import sys

# Beside this script.
import two_processes
import two_shards

if __name__ == "__main__":
    folder, tokenizer = sys.argv[1:]
    two_processes.main(folder)
    two_shards.main(folder, tokenizer)

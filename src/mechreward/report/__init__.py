"""One run directory or study in, one self-contained HTML page out; it reads files only, no model and no network.

A study is judged anew, by `gates`. May import every room above it; pipeline and cli import it.
"""

from mechreward.report.data import Run, read_run
from mechreward.report.render import write_report

__all__ = ["Run", "read_run", "write_report"]

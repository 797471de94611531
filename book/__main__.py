"""`python -m book [FOLDER]`: builds the site."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; set before torch is imported

from book.run import ExampleError
from book.site import BookError, build_site
from book.source import ROOT, AnchorError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m book", description="Build the book as a site.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site", help="the folder of the site")
    parser.add_argument("--no-run", action="store_true", help="show the examples without running them")
    options = parser.parse_args()
    try:
        build_site(options.folder, run=not options.no_run)
    except (BookError, AnchorError, ExampleError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

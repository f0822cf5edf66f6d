"""Build the documentation site into ``build/site``; anything that zensical or the check of its links finds wrong is an error.

python -m website            (`make docs`)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from website.links import broken_links
from website.staging import stage

PROJECT = Path(__file__).resolve().parent.parent
BUILT = PROJECT / "build" / "site"


def main() -> int:
    try:
        stage(PROJECT, PROJECT / "build" / "site-source")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(BUILT, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=PROJECT).returncode:
        return 1
    if broken := broken_links(BUILT):
        print("\n".join(broken), file=sys.stderr)
        return 1
    print(f"{len(list(BUILT.rglob('*.html')))} pages, every link and anchor checked: {BUILT / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

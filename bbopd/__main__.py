"""``python -m bbopd`` is ``bbopd``."""

from bbopd.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

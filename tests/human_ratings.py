"""People who rate answers, made in code: exports as the page writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Values = tuple[str, tuple[int, int], tuple[int, int]]  # preference; fluency and correctness of side A, and of side B


def export(folder: Path, page: str, rater: str, ratings: Mapping[str, Values], **changes: Any) -> Path:
    lines = [
        {
            "item": item,
            "preference": preference,
            "A": dict(zip(("fluency", "correctness"), first, strict=True)),
            "B": dict(zip(("fluency", "correctness"), second, strict=True)),
        }
        for item, (preference, first, second) in ratings.items()
    ]
    content = {"format": "bbopd human ratings 1", "page": page, "rater": rater, "ratings": lines} | changes
    path = folder / f"{rater}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path

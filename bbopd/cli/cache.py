"""``bbopd cache``: look at the answers of teachers that were kept, check them, and make room."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bbopd.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from bbopd.teachers.answer_store import AnswerStore

_DAY = 86_400.0
_SHOWN = 20  # questions of the ledger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    for name, summary in (
        ("stats", "what is kept, and what was asked without being kept"),
        ("verify", "check every answer, and drop the damaged ones"),
        ("prune", "remove old answers"),
    ):
        action = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        action.add_argument("path", help="the file that teacher.cache.path names")
        action.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
        if name == "prune":
            action.add_argument("--older-than", type=float, metavar="DAYS", help="remove answers kept for longer than this")
            action.add_argument("--keep-bytes", type=int, metavar="N", help="then remove the oldest until this much is left")
            action.add_argument("--unfinished", action="store_true", help="forget what was asked without being kept")


def run(args: argparse.Namespace) -> int:
    from bbopd.teachers.answer_store import AnswerStore

    if not Path(args.path).is_file():
        raise ConfigError(f"there is no cache {args.path}")
    store = AnswerStore(args.path)
    try:
        if args.action == "stats":
            _show(store, as_json=args.json)
        elif args.action == "verify":
            right, dropped = store.verify()
            said = f"{right} answers are right, {dropped} were damaged and have been dropped"
            print(json.dumps({"right": right, "dropped": dropped}) if args.json else said)
            if dropped:
                raise TeacherError("damaged answers were dropped; they will be asked again where they are needed")
        else:
            if args.older_than is None and args.keep_bytes is None and not args.unfinished:
                raise ConfigError("say what to remove: --older-than, --keep-bytes or --unfinished")
            age = None if args.older_than is None else args.older_than * _DAY
            removed = store.prune(older_than=age, keep_bytes=args.keep_bytes, forget_unfinished=args.unfinished)
            print(json.dumps({"removed": removed}) if args.json else f"removed {removed} answers")
    finally:
        store.close()
    return 0


def _show(store: AnswerStore, *, as_json: bool) -> None:
    stats = store.stats()
    if as_json:
        rows = [dict(zip(("teacher", "kind", "answers", "bytes"), row, strict=True)) for row in stats.rows]
        unfinished = [asdict(entry) for entry in stats.unfinished]
        print(json.dumps({"path": str(store.path), "bytes": stats.file_bytes, "kept": rows, "unfinished": unfinished}))
        return
    print(f"{store.path}: {stats.file_bytes:,} bytes")
    for teacher, kind, count, size in stats.rows:
        print(f"  {teacher}, {kind}: {count:,} answers, {size:,} bytes")
    running = sum(entry.is_running for entry in stats.unfinished)
    lost = [entry for entry in stats.unfinished if not entry.is_running]
    print(f"being asked now: {running}")
    print(f"asked, and perhaps paid, without an answer kept: {len(lost)} ({sum(entry.tokens for entry in lost):,} tokens)")
    for entry in lost[:_SHOWN]:
        when = datetime.fromtimestamp(entry.asked_at).astimezone().isoformat(timespec="seconds")
        print(f"  {entry.name}: {entry.tokens} tokens, asked {when} ({(time.time() - entry.asked_at) / 3600:.1f} h ago)")
    if len(lost) > _SHOWN:
        print(f"  and {len(lost) - _SHOWN} more")

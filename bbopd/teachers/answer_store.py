"""Answers on disk, by the hash of their question, in one SQLite file that processes may share; with a ledger of what is being asked.

SQLite is in the standard library, keeps a transaction whole when a process is killed in the middle of it, and lets several processes
write; a memory-mapped store would need its size known beforehand. Write-ahead logging lets readers go on beside a writer; every commit is
synced, since what is stored here may have cost money.

A question is written to the ledger before it is asked and leaves it in the transaction that stores its answer. So after a crash the
ledger lists what may have been paid for without being kept, and no more.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from bbopd.errors import TeacherError

__all__ = ["AnswerStore", "StoreFullError", "StoreStats", "Unfinished"]

_VERSION = 1
_BUSY_SECONDS = 60.0  # that another process may hold the file
_OPEN_TRIES = 1200
_DIGEST_BYTES = 16
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, teacher TEXT, kind TEXT, digest BLOB, data BLOB, stored_at REAL);
CREATE TABLE IF NOT EXISTS asked (key BLOB PRIMARY KEY, owner TEXT, name TEXT, tokens INTEGER, asked_at REAL);
"""

Result = TypeVar("Result")


class StoreFullError(TeacherError):
    """There is no room for another answer: on the disk, or within the limit set."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A question that was asked and whose answer is not kept. ``is_running``: whoever asked it still waits for it."""

    name: str
    tokens: int
    asked_at: float
    is_running: bool


@dataclass(frozen=True, slots=True)
class StoreStats:
    """``rows``: teacher, kind, number of answers, their bytes."""

    file_bytes: int
    rows: tuple[tuple[str, str, int, int], ...]
    unfinished: tuple[Unfinished, ...]


class AnswerStore:
    """One file. Not for use by two threads at once; processes and objects may share it.

    Parameters
    ----------
    path : the file; it and its folder are made where they are missing.
    max_bytes : size beyond which the file does not grow; None: the disk's.

    Raises
    ------
    TeacherError : it cannot be opened, is no such file, or was written by another version.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self.corrupt = 0
        """Entries found damaged, and dropped, by this object."""
        self._owner = f"{os.getpid()}:{_start_of(os.getpid())}:{uuid.uuid4().hex}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise TeacherError(f"cannot open the cache {self.path}: {error}; set teacher.cache.path to another file") from error
        try:
            self._turn_on_write_ahead_log()
            self._db.execute("PRAGMA synchronous=FULL")
            if max_bytes is not None:
                page_bytes = self._one("PRAGMA page_size")
                self._db.execute(f"PRAGMA max_page_count={max(1, max_bytes // page_bytes)}")
            version = self._one("PRAGMA user_version")
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={_VERSION}")
            elif version != _VERSION:
                raise TeacherError(f"the cache {self.path} has format {version}, this version reads {_VERSION}: move it away")
        except sqlite3.Error as error:
            self._db.close()
            raise TeacherError(f"the cache {self.path} cannot be used ({error}): move it away, or set teacher.cache.path") from error
        except TeacherError:
            self._db.close()
            raise

    def close(self) -> None:
        """Give up what is still claimed, and close the file."""
        with suppress(StoreFullError):
            self._write(lambda: self._db.execute("UPDATE asked SET owner='' WHERE owner=?", (self._owner,)))
        self._db.close()

    # ------------------------------------------------------------ questions and answers

    def find_or_claim(self, key: bytes, name: str, tokens: int, *, takes_over: bool = False) -> bytes | Literal["mine", "theirs"]:
        """The answer to a question; or, where there is none, the right and duty to ask it, unless someone else is just doing so.

        Parameters
        ----------
        key : hash of the question.
        name, tokens : what the ledger says of it.
        takes_over : whether to claim it though its owner still runs.

        Raises
        ------
        StoreFullError : the ledger cannot be written.
        """
        data = self.find(key)
        if data is not None:
            return data

        def claim() -> Literal["mine", "theirs", "answered"]:
            if self._one("SELECT count(*) FROM answers WHERE key=?", key):
                return "answered"  # since the look at it
            row = self._db.execute("SELECT owner FROM asked WHERE key=?", (key,)).fetchone()
            if row is not None and _is_running(row[0]) and not takes_over:
                return "theirs"
            self._db.execute("INSERT OR REPLACE INTO asked VALUES (?,?,?,?,?)", (key, self._owner, name, tokens, time.time()))
            return "mine"

        outcome = self._write(claim)
        if outcome == "answered":
            data = self.find(key)
            return "mine" if data is None else data
        return outcome

    def find(self, key: bytes) -> bytes | None:
        """The answer to a question, where there is a whole one; a damaged one is dropped and counted."""
        try:
            row = self._db.execute("SELECT digest, data FROM answers WHERE key=?", (key,)).fetchone()
        except sqlite3.DatabaseError:  # a damaged page: what was on it is asked again
            row = (b"", b"")
        if row is None:
            return None
        if row[0] != _digest(key, row[1]):
            self.drop(key)
            return None
        return bytes(row[1])

    def put(self, key: bytes, teacher: str, kind: str, data: bytes) -> None:
        """Keep an answer, and take its question out of the ledger. Raises `StoreFullError`."""

        def store() -> None:
            entry = (key, teacher, kind, _digest(key, data), data, time.time())
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?,?)", entry)
            self._db.execute("DELETE FROM asked WHERE key=?", (key,))

        self._write(store)

    def drop(self, key: bytes) -> None:
        """Remove an answer that turned out damaged, and count it."""
        self.corrupt += 1
        self._write(lambda: self._db.execute("DELETE FROM answers WHERE key=?", (key,)))

    def give_up(self, keys: Iterable[bytes]) -> None:
        """Say that these are not waited for any more: others may ask them, and the ledger goes on listing them."""
        entries = [(key, self._owner) for key in keys]
        self._write(lambda: self._db.executemany("UPDATE asked SET owner='' WHERE key=? AND owner=?", entries))

    # ------------------------------------------------------------ looking after it

    def stats(self) -> StoreStats:
        rows = self._db.execute(
            "SELECT teacher, kind, count(*), sum(length(data)) FROM answers GROUP BY teacher, kind ORDER BY teacher, kind"
        ).fetchall()
        asked = self._db.execute("SELECT name, tokens, asked_at, owner FROM asked ORDER BY asked_at").fetchall()
        unfinished = tuple(Unfinished(name, tokens, asked_at, _is_running(owner)) for name, tokens, asked_at, owner in asked)
        pages = self._one("PRAGMA page_count") * self._one("PRAGMA page_size")
        return StoreStats(pages, tuple((teacher, kind, count, size or 0) for teacher, kind, count, size in rows), unfinished)

    def verify(self) -> tuple[int, int]:
        """Look at every answer, and drop the damaged ones. Returns how many are right and how many were dropped."""
        right = 0
        before = self.corrupt
        for (key,) in self._db.execute("SELECT key FROM answers").fetchall():
            right += self.find(key) is not None
        return right, self.corrupt - before

    def prune(self, *, older_than: float | None = None, keep_bytes: int | None = None, forget_unfinished: bool = False) -> int:
        """Remove answers stored more than ``older_than`` seconds ago, then the oldest until ``keep_bytes`` are left; how many.

        ``forget_unfinished`` empties the ledger of what nobody waits for any more. The file shrinks to what is left.
        """

        def remove() -> int:
            removed = 0
            if older_than is not None:
                removed += self._db.execute("DELETE FROM answers WHERE stored_at<?", (time.time() - older_than,)).rowcount
            if keep_bytes is not None:
                removed += self._db.execute(
                    "DELETE FROM answers WHERE key IN (SELECT key FROM (SELECT key, sum(length(data)) OVER (ORDER BY stored_at DESC, key) "
                    "AS newer FROM answers) WHERE newer>?)",
                    (keep_bytes,),
                ).rowcount
            if forget_unfinished:
                for key, owner in self._db.execute("SELECT key, owner FROM asked").fetchall():
                    if not _is_running(owner):
                        self._db.execute("DELETE FROM asked WHERE key=?", (key,))
            return removed

        removed = self._write(remove)
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    # ------------------------------------------------------------ SQLite

    def _turn_on_write_ahead_log(self) -> None:
        """Two processes that open a new file at once may find it locked here, where SQLite does not wait by itself."""
        for attempt in range(_OPEN_TRIES):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if attempt == _OPEN_TRIES - 1:
                    raise
                time.sleep(0.05)

    def _one(self, statement: str, *values: Any) -> int:
        return int(self._db.execute(statement, values).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Any:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back where the disk is full
                self._db.execute("ROLLBACK")
            raise

    def _write(self, work: Callable[[], Result]) -> Result:
        try:
            with self._transaction():
                return work()
        except sqlite3.Error as error:
            raise StoreFullError(f"cannot write to the cache {self.path}: {error}") from error


def _digest(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key).digest()


def _start_of(pid: int) -> str:
    """When a process began, in the kernel's own units; empty where there is none: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_running(owner: str) -> bool:
    pid, _, rest = owner.partition(":")
    return bool(pid) and (start := _start_of(int(pid))) != "" and start == rest.partition(":")[0]

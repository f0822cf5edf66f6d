"""What a teacher costs and how much it may: money is set aside before a request is made and settled after it, in a file that lasts.

The file is SQLite, like the cache, and for the same reasons. What was set aside by a process that died before it settled stays counted:
the request may have been paid. So the sum never says less than what was spent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sqlite3
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bbopd.errors import BudgetSpentError, ConfigError, TeacherError

__all__ = ["Budget", "Prices", "Reservation", "Spending"]

_UNITS = 10**9  # of one unit of the currency: sums of whole numbers lose nothing
_BUSY_SECONDS = 60.0  # that another process may hold the file
_SCHEMA = """
CREATE TABLE IF NOT EXISTS settled (one INTEGER PRIMARY KEY CHECK (one = 1), currency TEXT, paid INTEGER, requests INTEGER,
                                    prompt_tokens INTEGER, answer_tokens INTEGER);
CREATE TABLE IF NOT EXISTS reserved (id INTEGER PRIMARY KEY AUTOINCREMENT, amount INTEGER, reserved_at REAL);
"""
_log = logging.getLogger("bbopd.budget")


@dataclass(frozen=True, slots=True)
class Prices:
    """For a million tokens of prompts and of answers."""

    prompt: float = 0.0
    answer: float = 0.0
    currency: str = "USD"

    def cost(self, prompt_tokens: int, answer_tokens: int) -> int:
        """In billionths of the currency, rounded up."""
        return math.ceil((prompt_tokens * self.prompt + answer_tokens * self.answer) * (_UNITS / 1e6) - 1e-6)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one request."""

    number: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Spending:
    """``paid`` and ``reserved`` in the currency; ``reserved`` is of requests under way, or of ones whose process died."""

    currency: str
    limit: float | None
    paid: float
    reserved: float
    requests: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def total(self) -> float:
        return self.paid + self.reserved


class Budget:
    """A sum of money in a file, which runs may share. For one event loop; the file is touched by a thread of its own.

    Parameters
    ----------
    path : made where it is missing.
    limit : of all that was ever spent by this file, in ``prices.currency``; None only counts.

    Raises
    ------
    ConfigError : the file counts another currency.
    TeacherError : it cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], prices: Prices, limit: float | None = None) -> None:
        self.path = Path(path)
        self.prices = prices
        self._limit = limit
        self._open = 0  # requests under way, and attempts to reserve
        self._settled = 0
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bbopd-budget")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO settled VALUES (1, ?, 0, 0, 0, 0)", (prices.currency,))
            (currency,) = self._db.execute("SELECT currency FROM settled").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise TeacherError(f"cannot keep the teacher's cost in {self.path}: {error}; set teacher.budget.path") from error
        if currency != prices.currency:
            self._db.close()
            raise ConfigError(
                f"{self.path} counts {currency}, the teacher's prices are in {prices.currency}: set teacher.prices.currency to {currency}, "
                "or teacher.budget.path to another file"
            )

    async def reserve(self, prompt_tokens: int, answer_tokens: int) -> Reservation:
        """Set aside what a request may cost at most; where there is no room, once what is under way has been settled.

        Raises
        ------
        BudgetSpentError : there is no room, and nothing under way here that could make some.
        """
        amount = self.prices.cost(prompt_tokens, answer_tokens)
        while True:
            settled = self._settled
            self._open += 1
            making = asyncio.ensure_future(asyncio.wrap_future(self._thread.submit(self._reserve, amount)))
            try:
                number = await asyncio.shield(making)
            except asyncio.CancelledError:
                making.add_done_callback(self._undo)
                raise
            except Exception:
                self._close_one()
                raise
            if number is not None:
                return Reservation(number, prompt_tokens, answer_tokens)
            self._close_one()
            while self._settled == settled:  # what was settled meanwhile may have made room
                if not self._open:
                    raise self._spent(amount)
                self._changed.clear()
                await self._changed.wait()

    def settle(self, reservation: Reservation, prompt_tokens: int | None = None, answer_tokens: int | None = None) -> None:
        """Count what a request has cost: the tokens that were charged, or, where that is not known, what was set aside."""
        prompt = reservation.prompt_tokens if prompt_tokens is None else prompt_tokens
        answer = reservation.answer_tokens if answer_tokens is None else answer_tokens
        self._submit(reservation.number, self.prices.cost(prompt, answer), 1, prompt, answer)
        self._settled += 1
        self._close_one()

    def release(self, reservation: Reservation) -> None:
        """Give back what was set aside for a request that was not answered, and so not paid."""
        self._submit(reservation.number, 0, 0, 0, 0)
        self._settled += 1
        self._close_one()

    def spending(self) -> Spending:
        """What was spent so far, by all that share the file."""
        paid, requests, prompt, answer, reserved = self._thread.submit(self._read).result()
        return Spending(self.prices.currency, self._limit, paid / _UNITS, reserved / _UNITS, requests, prompt, answer)

    def close(self) -> None:
        """Write what is still to be written, and close the file."""
        self._thread.submit(self._db.close)
        self._thread.shutdown(wait=True)

    def _close_one(self) -> None:
        self._open -= 1
        self._changed.set()

    def _undo(self, making: asyncio.Future[int | None]) -> None:
        """The request that this was for was given up while it was made: nothing was sent."""
        number = None if making.cancelled() or making.exception() is not None else making.result()
        if number is not None:
            self._submit(number, 0, 0, 0, 0)
        self._close_one()

    def _spent(self, amount: int) -> BudgetSpentError:
        now = self.spending()
        lost = f" and {now.reserved:.6g} set aside for requests whose outcome is not known" if now.reserved else ""
        return BudgetSpentError(
            f"the teacher's budget of {self._limit:.6g} {now.currency} is spent: {now.paid:.6g} paid{lost}, and the next request may cost "
            f"{amount / _UNITS:.3g}; raise teacher.budget.limit, and the same command goes on"
        )

    # ------------------------------------------------------------ in the thread

    def _submit(self, number: int, cost: int, requests: int, prompt_tokens: int, answer_tokens: int) -> None:
        def settle() -> None:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("DELETE FROM reserved WHERE id=?", (number,))
                self._db.execute(
                    "UPDATE settled SET paid=paid+?, requests=requests+?, prompt_tokens=prompt_tokens+?, answer_tokens=answer_tokens+?",
                    (cost, requests, prompt_tokens, answer_tokens),
                )
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

        def complain(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                _log.warning("cannot write to %s (%s): the whole of what was set aside for one request stays counted", self.path, error)

        self._thread.submit(settle).add_done_callback(complain)

    def _reserve(self, amount: int) -> int | None:
        """The number of a new reservation; None where there is no room for it."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                paid, *_, reserved = self._read()
                if self._limit is not None and paid + reserved + amount > self._limit * _UNITS:
                    self._db.execute("ROLLBACK")
                    return None
                row = self._db.execute("INSERT INTO reserved (amount, reserved_at) VALUES (?, ?)", (amount, time.time()))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise TeacherError(f"cannot keep the teacher's cost in {self.path}: {error}; make room, or set teacher.budget.path") from error
        return row.lastrowid

    def _read(self) -> tuple[int, int, int, int, int]:
        settled = self._db.execute("SELECT paid, requests, prompt_tokens, answer_tokens FROM settled").fetchone()
        (reserved,) = self._db.execute("SELECT coalesce(sum(amount), 0) FROM reserved").fetchone()
        return (*settled, reserved)

"""Documents once: copies are known by the hash of their content, near-duplicates by what the student reads of them."""

from __future__ import annotations

import hashlib

from bbopd.data.documents import Document
from bbopd.data.near_duplicates import NearDuplicates


class Distinct:
    """The documents so far. ``near`` finds near-duplicates, among those of others that share it too; None looks for copies alone."""

    def __init__(self, near: NearDuplicates | None) -> None:
        self._near = near
        self._digests: set[bytes] = set()

    def find(self, document: Document) -> str | None:
        """``copy`` or ``near_duplicate`` where one like it was there; None for a new one."""
        if _digest(document) in self._digests:
            return "copy"
        return "near_duplicate" if self._near is not None and self._near.find(document.asked) is not None else None

    def find_or_add(self, document: Document) -> str | None:
        """As `find`; a new one is remembered."""
        reason = self.find(document)
        if reason is None:
            self._digests.add(_digest(document))
            if self._near is not None:
                self._near.add(f"{len(self._digests)} {document.where}", document.asked)
        return reason


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.content.encode()).digest()

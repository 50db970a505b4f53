"""Replies on disk, so that asking again costs nothing and says the same."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from alignment.types import UserInputError

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 30.0  # for another process that is writing


class ReplyCache:
    """Texts by key in one SQLite file, for several threads and processes at once.

    A text is there completely or not at all, whenever its writer is killed. The first text stored
    under a key stays.

    Raises:
        UserInputError: the file cannot be made or is not such a cache.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._warned = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self._path, timeout=_WAIT_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text BLOB NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> str | None:
        """The text stored under `key`, or None.

        Raises:
            UserInputError: the file is damaged, or is not a cache.
        """
        try:
            with self._lock:
                return self._stored(key)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def put(self, key: str, text: str) -> str:
        """Store `text` unless there is one already; returns what is stored.

        A text that cannot be written is returned all the same, with one warning: what was paid
        for is not thrown away because a disk is full.
        """
        try:
            with self._lock:
                self._connection.execute(
                    "INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, text.encode())
                )
                return self._stored(key) or text
        except sqlite3.Error as error:
            if not self._warned:
                logger.warning("replies are no longer cached: %s", self._unusable(error))
            self._warned = True
            return text

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _stored(self, key: str) -> str | None:
        row = self._connection.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0]).decode()

    def _unusable(self, error: Exception) -> UserInputError:
        return UserInputError(
            f"the reply cache {self._path} cannot be used: {error}; delete the file if it is "
            "damaged, free some space, or give another path"
        )

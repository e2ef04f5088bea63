"""A dictionary of bounded size, which drops what was set longest ago."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Container
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(OrderedDict[K, V], Generic[K, V]):
    """A dictionary that drops the entries that were set longest ago. Setting is thread-safe.

    ``max_bytes`` limits the sum of the sizes that ``set`` is given. Keys in ``pinned`` stay.
    """

    def __init__(
        self, max_entries: int, max_bytes: int = sys.maxsize, pinned: Container[K] = ()
    ) -> None:
        super().__init__()
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._pinned = pinned
        self._sizes: dict[K, int] = {}
        self._bytes = 0
        self._mutex = threading.Lock()

    def set(self, key: K, value: V, size: int = 0) -> None:
        """Set an entry, as the newest."""
        with self._mutex:
            self._bytes += size - self._sizes.pop(key, 0)
            if size:
                self._sizes[key] = size
            self[key] = value
            self.move_to_end(key)
            if len(self) > self._max_entries or self._bytes > self._max_bytes:
                self._evict()

    def drop(self, key: K) -> None:
        """Remove an entry; no-op if it is missing."""
        with self._mutex:
            self._bytes -= self._sizes.pop(key, 0)
            self.pop(key, None)

    def _evict(self) -> None:
        while len(self) > self._max_entries or self._bytes > self._max_bytes:
            oldest = next((key for key in self if key not in self._pinned), None)
            if oldest is None:
                return
            self._bytes -= self._sizes.pop(oldest, 0)
            del self[oldest]

"""What has changed and is not in the mirror yet: keys, never contents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent_state.redis.mirror_layout import Place


class Waiting:
    """Places, each once however often it changes, and since when each has waited.

    So there are never more of them than there are documents. What was taken counts until it is
    ``done``.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, dict[Place, float]] = {}
        self._taken: dict[Place, float] = {}

    def __len__(self) -> int:
        twice = sum(place in self._kinds[place[0]] for place in self._taken)
        return sum(map(len, self._kinds.values())) + len(self._taken) - twice

    def add(self, place: Place, now: float) -> None:
        self._kinds.setdefault(place[0], {}).setdefault(place, now)

    def kinds(self) -> list[str]:
        """The kinds of which something waits."""
        return [kind for kind, places in self._kinds.items() if places]

    def count(self, kind: str) -> int:
        return len(self._kinds.get(kind, ()))

    def take(self, kind: str, most: int) -> dict[Place, float]:
        """The first of a kind. One that changes from now on waits again."""
        places = self._kinds.get(kind, {})
        first = [place for place, _ in zip(places, range(most), strict=False)]
        taken = {place: places.pop(place) for place in first}
        self._taken.update(taken)
        return taken

    def done(self, places: Iterable[Place]) -> None:
        """These are there now, or wait again."""
        for place in places:
            self._taken.pop(place, None)

    def put_back(self, taken: Mapping[Place, float]) -> None:
        """They wait again, and have done so all the time."""
        for place, since in taken.items():
            places = self._kinds.setdefault(place[0], {})
            places[place] = min(since, places.get(place, since))

    def oldest(self) -> float | None:
        """Since when something has waited; None when nothing waits."""
        all_of_them = (*self._kinds.values(), self._taken)
        return min((min(places.values()) for places in all_of_them if places), default=None)

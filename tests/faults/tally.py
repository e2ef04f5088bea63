"""What a test of the proof counts."""

from __future__ import annotations

from dataclasses import dataclass, fields

COLUMNS = ("points", "faults", "acknowledged", "lost", "unreadable", "leaked", "twice", "stuck")


@dataclass
class Tally:
    """What one test did and saw.

    ``points``: states looked at, or rounds. ``faults``: faults that really happened.
    ``acknowledged``: changes whose caller was told they are done. ``lost``: those of them that
    were not there afterwards. ``unreadable``: documents or records that could not be read.
    ``leaked``: temporary files, journals, locks and descriptors left behind. ``twice``: what was
    done or sent more than once, or by somebody who may not. ``stuck``: what never ended.
    """

    points: int = 0
    faults: int = 0
    acknowledged: int = 0
    lost: int = 0
    unreadable: int = 0
    leaked: int = 0
    twice: int = 0
    stuck: int = 0

    def add(self, other: Tally) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def clean(self) -> bool:
        """Whether nothing was lost, unreadable, left behind, done twice or stuck."""
        return not (self.lost or self.unreadable or self.leaked or self.twice or self.stuck)

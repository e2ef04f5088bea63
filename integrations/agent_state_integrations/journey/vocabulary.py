"""The words of a journey: what somebody may feel, and what kind of insight there may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from agent_state.errors import StateValidationError


class EmotionalState(StrEnum):
    """The eight states by default."""

    NEUTRAL = "neutral"
    HAPPY = "happy"
    FRUSTRATED = "frustrated"
    ANXIOUS = "anxious"
    BREAKTHROUGH = "breakthrough"
    INTEGRATED = "integrated"
    EXPLORING = "exploring"
    RESISTANT = "resistant"


class TherapeuticCategory(StrEnum):
    """The six categories of a breakthrough by default."""

    REFRAME = "reframe"
    INTEGRATION = "integration"
    INSIGHT = "insight"
    ACCEPTANCE = "acceptance"
    PATTERN_RECOGNITION = "pattern_recognition"
    RESOLUTION = "resolution"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words an application uses. What is stored in other words is still read.

    ``first_emotion`` is where every journey begins, ``first_category`` what a breakthrough is
    when nobody says; each must be one of its words. Raises ``StateValidationError`` for a
    vocabulary that is none.
    """

    emotions: tuple[str, ...] = tuple(str(word) for word in EmotionalState)
    categories: tuple[str, ...] = tuple(str(word) for word in TherapeuticCategory)
    first_emotion: str = "neutral"
    first_category: str = "insight"

    def __post_init__(self) -> None:
        object.__setattr__(self, "emotions", _words("emotions", self.emotions))
        object.__setattr__(self, "categories", _words("categories", self.categories))
        object.__setattr__(self, "first_emotion", self.emotion(self.first_emotion))
        object.__setattr__(self, "first_category", self.category(self.first_category))

    def emotion(self, word: object) -> str:
        """The word as plain text. Raises ``StateValidationError`` when it is none of ours."""
        return _known(word, self.emotions, "emotion")

    def category(self, word: object) -> str:
        """The word as plain text. Raises ``StateValidationError`` when it is none of ours."""
        return _known(word, self.categories, "category")


def _words(name: str, given: Iterable[object]) -> tuple[str, ...]:
    words = () if isinstance(given, str) else tuple(given)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise StateValidationError(f"{name}: a vocabulary is one or more words")
    plain = tuple(str(word) for word in words)
    if len(set(plain)) < len(plain):
        raise StateValidationError(f"{name}: a word is there twice")
    return plain


def _known(word: object, words: tuple[str, ...], what: str) -> str:
    if isinstance(word, str) and word in words:
        return str(word)
    raise StateValidationError(f"{what} {word!r:.80} is none of {', '.join(words)}")

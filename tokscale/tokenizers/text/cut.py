"""How much of captions does not fit: counted wherever they become ids, and said once, with the key that changes it."""

from dataclasses import dataclass
from typing import Any


@dataclass
class CutCaptions:
    """A count over captions."""

    captions: int = 0
    cut: int = 0
    """Captions that lost their end."""
    tokens: int = 0
    """Of all captions as they were written."""
    lost: int = 0
    """Tokens beyond the limit."""
    longest: int = 0
    """Tokens of the longest caption."""
    limit: int = 0
    """Tokens that fit, as last asked for."""

    def add(self, tokens: int, limit: int) -> None:
        """One caption of so many tokens, of which `limit` fit."""
        self.captions += 1
        self.tokens += tokens
        self.longest, self.limit = max(self.longest, tokens), limit
        if tokens > limit:
            self.cut += 1
            self.lost += tokens - limit

    def metrics(self) -> dict[str, Any]:
        """For a file."""
        return {
            "captions": self.captions,
            "cut": self.cut,
            "share cut": round(self.cut / max(self.captions, 1), 4),
            "tokens lost": self.lost,
            "share of tokens lost": round(self.lost / max(self.tokens, 1), 4),
            "longest": self.longest,
            "limit": self.limit,
        }

    def words(self, key: str) -> str | None:
        """What was cut and which key changes it, None when nothing was."""
        if not self.cut:
            return None
        return (
            f"{self.cut} of {self.captions} captions ({100 * self.cut / self.captions:.0f} %) have more than the "
            f"{self.limit} tokens that fit and lose their end, {100 * self.lost / self.tokens:.0f} % of all; the "
            f"longest has {self.longest}. {key} decides how many fit"
        )

"""What a check of ``doctor`` says."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable


class CheckStatus(str, enum.Enum):
    """``pass``; ``warn``: works, but slower or in part; ``fail``: does not work."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check; ``remedy`` is empty when it passed."""

    name: str
    status: CheckStatus
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """A JSON-ready dict."""
        return {**dataclasses.asdict(self), "status": self.status.value}


Outcome = tuple[CheckStatus, str, str]
"""Status, what was found, and what to do about it."""
NamedCheck = tuple[str, Callable[[], Outcome], str]
"""The name a check is reported under, the check, what to do if it raises."""


def passed(detail: str) -> Outcome:
    """A check that found nothing to do."""
    return CheckStatus.PASS, detail, ""

"""What a host reports of its part in a round; posted again where the store has lost it."""

import time

from launcher.elastic import membership
from launcher.elastic.membership import Policy, Report
from launcher.elastic.store import Change, Link

_AGAIN_SECONDS = 2.0


class Reporter:
    """Changes of the record that end a host's part in the present round. The last of them is kept, to be posted again."""

    def __init__(self, link: Link, node_id: str, policy: Policy) -> None:
        self._link, self._node_id, self._policy = link, node_id, policy
        self._number = 0  # of the round
        self._posted: Change | None = None
        self._posted_at = 0.0

    def begin(self, number: int) -> None:
        """A round begins, and what was reported of the one before does not matter any more."""
        self._number, self._posted = number, None

    def report(self, why: Report) -> None:
        """The round has to end."""
        number, policy = self._number, self._policy
        self._post(lambda record: membership.report(record, number, why, policy))

    def finish(self) -> None:
        """All ranks of this host are complete."""
        number, node_id = self._number, self._node_id
        self._post(lambda record: membership.finish(record, number, node_id))

    def mark_broken(self) -> None:
        """A rank is gone: the other hosts need not wait for it to save."""
        number = self._number
        self._link.post(lambda record: membership.mark_broken(record, number))

    def repeat(self) -> None:
        """Post it again, for it may have got lost with a store that was replaced. The record takes it once."""
        if self._posted and self._link.idle and time.monotonic() - self._posted_at > _AGAIN_SECONDS:
            self._post(self._posted)

    def _post(self, change: Change) -> None:
        self._posted, self._posted_at = change, time.monotonic()
        self._link.post(change)

"""Whether a store is being written right now, as far as its listing tells.

S3 has no snapshots.  Objects that are fetched as they were listed are of those versions for
certain, but a listing in the middle of an overwrite names new objects beside old ones, and one in
the middle of a first upload lacks some.  So a store that was written a moment ago has to look the
same until its newest object is two seconds old; S3 lists whole seconds, there it may be one.  A
writer that stops for longer than that between two objects cannot be told from one that has
finished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from zarrcache._keys import ObjectInfo, source_digest
from zarrcache.errors import IncompleteArrayError

__all__ = ["REWRITE_WAITS_S", "settled_listing", "unsettled_s", "wait_until"]

logger = logging.getLogger(__name__)

#: A store whose newest object is older than this is taken for written.
_SETTLED_S = 2.0
#: Objects this far apart in age, the newest within a minute, look like a store that is being
#: overwritten, whatever the clocks say.
_SPREAD_S = 5.0
_LATELY_S = 60.0
#: Before a store that has changed is read again.
REWRITE_WAITS_S = (0.5, 1.0, 2.0, 4.0)


def unsettled_s(listed: Collection[ObjectInfo]) -> float:
    """For how many seconds from now a listing has to stay the same before it is trusted; 0.0 if it
    may be at once.
    """
    now_s = time.time()
    ages = [now_s - o.modified_s for o in listed if o.modified_s]
    if not ages:
        return 0.0
    if min(ages) < _SETTLED_S:
        # by a server whose clock is ahead, objects are younger than nothing
        return min(_SETTLED_S, _SETTLED_S - min(ages))
    return _SETTLED_S if min(ages) < _LATELY_S and max(ages) - min(ages) > _SPREAD_S else 0.0


def wait_until(end_s: float) -> None:
    """Sleep until ``time.monotonic()`` is ``end_s``."""
    time.sleep(max(0.0, end_s - time.monotonic()))


def settled_listing(list_store: Callable[[], list[ObjectInfo]], url: str) -> list[ObjectInfo]:
    """What ``list_store`` lists, when nobody writes there any more.

    Raises
    ------
    IncompleteArrayError
        Somebody does, for longer than we wait.
    """
    listed = list_store()
    for _ in range(len(REWRITE_WAITS_S) + 1):
        pause_s = unsettled_s(listed)
        if not pause_s:
            return listed
        wait_until(time.monotonic() + pause_s)
        before, listed = listed, list_store()
        if source_digest(listed) == source_digest(before):
            return listed
        logger.info("%s is being written; waiting", url)
    raise IncompleteArrayError(
        f"{url} kept changing while it was read. Wait until its writer has finished."
    )

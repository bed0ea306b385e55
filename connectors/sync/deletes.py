"""Records that are gone at a system: when that is believed, and what is kept of them."""

from __future__ import annotations

from datetime import datetime, timedelta
from math import ceil

from django.db.models import Q

from connectors.models import Connection, CustomerLink, Issue
from connectors.provider import Provider
from connectors.states import LinkState
from connectors.sync import issues

# A changed filter or a lost permission looks exactly like many deletes.
FEW, SHARE = 20, 0.05
TOO_MANY = "More customers seem to be deleted there than is plausible. Check what the login may see, then resume."
SYSTEM, HUB = "system", "hub"


def plausible(*, connection: Connection, number: int, at: datetime) -> bool:
    """Whether so many deletes may be believed, those of the last day included. If not, an issue is opened."""
    links = CustomerLink.objects.filter(connection=connection, remote_id__isnull=False)
    since = at - timedelta(days=1)
    recent = links.filter(deleted_at__gt=since, tombstone__by=SYSTEM).count()
    # Those that were made again at once are no tombstones any more.
    again = CustomerLink.objects.filter(~Q(former_remote_id=""), connection=connection, deleted_at=None)
    recent += again.filter(tombstone__by=SYSTEM, tombstone__at__gt=since.isoformat()).count()
    if recent + number <= FEW:
        return True
    live = links.filter(deleted_at=None)
    # Counted no further than it takes.
    if recent + number <= SHARE * (live.values("pk")[: ceil((recent + number) / SHARE)].count() + recent):
        return True
    linked = live.count() + recent
    issues.open_issue(
        connection=connection,
        kind=Issue.Kind.MASS_DELETE,
        message=f"{recent + number} of {linked} customers seem to be deleted there. Nothing was changed here.",
        details={"deleted": recent + number, "linked": linked},
        at=at,
    )
    return False


def pause(*, connection: Connection) -> None:
    """Stop using a connection until somebody has looked."""
    # Without an end, even if somebody had paused it until some time: that would be over by itself.
    changes = {"state": Connection.State.PAUSED, "state_reason": TOO_MANY, "paused_until": None}
    Connection.objects.filter(pk=connection.pk).update(**changes)
    for name, value in changes.items():
        setattr(connection, name, value)


def goes_with_archive(link: CustomerLink, provider: Provider | None) -> bool:
    """Whether archiving the customer deletes the record there. Needs the connection loaded."""
    connection = link.connection
    sent_to = connection.pushes and link.remote_id is not None and link.deleted_at is None and not link.is_duplicate
    deletes = provider is not None and provider.capabilities(connection).deletes
    return sent_to and deletes and connection.archive_policy == Connection.ArchivePolicy.DELETE


def bury(link: CustomerLink, *, evidence: str, at: datetime, by: str = SYSTEM) -> None:
    """Make a link a tombstone: what was known of the record stays, so that an old page cannot bring it back."""
    link.tombstone = {
        "remote_id": link.remote_id,
        "base_local": link.base_local,
        "base_remote": link.base_remote,
        "at": at.isoformat(),
        "evidence": evidence,
        "by": by,
    }
    link.deleted_at = link.updated_at = at
    link.state = LinkState.REMOTE_DELETED
    link.next_attempt_at = None


def detach(link: CustomerLink) -> None:
    """Turn a tombstone into a link that has yet to be created; the old id stays known."""
    link.former_remote_id, link.remote_id = link.remote_id or "", None
    link.base_local, link.base_remote, link.remote_data = {}, {}, {}
    link.remote_revision, link.remote_created_at, link.deleted_at = "", None, None
    link.state, link.pushed_version = LinkState.OPEN, 0
    link.epoch += 1
    link.sync_seq += 1

"""What can go wrong with a provider, named by what to do next.

ConnectorError            never raised itself
├── RetryLater            send the same thing again, later
├── OutcomeUnknown        look before sending again: it may have been applied
├── StaleRevision         read it, merge and send again: somebody else wrote first
├── Rejected              park this record until it, or the mapping, changes
│   ├── AlreadyExists     there is such a record: find out whether it is ours
│   └── Gone              the remote record does not exist (any more)
└── ConnectionUnusable    pause the whole connection until somebody repairs it
"""

from __future__ import annotations


class ConnectorError(Exception):
    """Base of the tree. `message` is safe to show staff: it never holds a key."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        status: int | None = None,
        code: str = "",
        remote_request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field  # the customer field concerned, by the hub's name for it
        self.status = status  # HTTP status, when an answer came
        self.code = code  # the provider's own code for the error
        self.remote_request_id = remote_request_id


class RetryLater(ConnectorError):
    """Transient. The request certainly did not take effect, or repeating it is harmless."""

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        field: str = "",
        status: int | None = None,
        code: str = "",
        remote_request_id: str = "",
    ) -> None:
        super().__init__(message, field=field, status=status, code=code, remote_request_id=remote_request_id)
        self.retry_after = retry_after  # seconds the provider asked for; None if it did not say


class OutcomeUnknown(ConnectorError):
    """The request may have been applied; no usable answer came.

    `replayed` is True when the provider gave the stored failure of an earlier request with the same idempotency key:
    the key is used up.
    """

    replayed = False


class StaleRevision(ConnectorError):
    """The record there is not the revision that the update was made for. Nothing was changed."""


class Rejected(ConnectorError):
    """This record is refused until it, or the mapping, changes."""


class AlreadyExists(Rejected):
    """A create is refused because the provider has a record like it. `remote_id` is that record's, "" if not named."""

    def __init__(self, message: str, *, remote_id: str, field: str = "", status: int | None = None) -> None:
        super().__init__(message, field=field, status=status, code="already_exists")
        self.remote_id = remote_id


class Gone(Rejected):
    """The remote record does not exist (any more)."""


class ConnectionUnusable(ConnectorError):
    """Credentials, configuration or host are wrong; every record of the connection waits."""

"""Every other system: the accounts at them, the keys they call with, and what each knows of each customer."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar
from urllib.parse import quote, urlsplit

import orjson
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import F, Func, Q
from django.db.models.functions import Now
from django.utils import timezone

from connectors.sealing import seal, unseal
from connectors.states import PARKED, STATUSES, LinkState, Status
from customers.ids import public_id, uuid7
from customers.models import Customer, CustomerChange, Organization
from customers.prepared import Param, Prepared

REMOTE_ID_LENGTH = 255
REMOTE_ID = "{remote_id}"


def check_record_url(text: str) -> None:
    """Raise ValidationError unless the text makes a web address of every record's id."""
    try:
        address = urlsplit(text)
    except ValueError:
        address = urlsplit("")
    good = address.scheme in ("http", "https") and address.hostname and "@" not in address.netloc
    if not good or any(c.isspace() or ord(c) < 32 or c == "\\" for c in text):
        raise ValidationError("Enter a web address that begins with https://.")
    if REMOTE_ID in address.netloc or REMOTE_ID not in text:
        raise ValidationError(f"Put {REMOTE_ID} where the record's id belongs, behind the host.")


# Links that may need a person: what `link_needs_you` indexes, and what a query must say as it stands here to use it.
# The constants are part of the text, because SQLite does not compare an index with parameters.
MAY_NEED_SOMEBODY = (
    Q(
        Func(
            F("state"),
            template="(%(expressions)s IN ('rejected', 'uncertain', 'conflict'))",
            output_field=models.BooleanField(),
        )
    )
    | Q(Func(F("conflicts"), template="(%(expressions)s <> '{}')", output_field=models.BooleanField()))
    | Q(deleted_at__isnull=False)
    | Q(is_duplicate=True)
)

# Links in one of `states.PARKED`, as `link_parked` has it, and as a query must say it for the same reason.
IS_PARKED = Q(
    Func(
        F("state"),
        template=f"(%(expressions)s IN ({', '.join(map(repr, map(str, PARKED)))}))",
        output_field=models.BooleanField(),
    )
)


class Connection(models.Model):
    """One account at one system."""

    class Direction(models.TextChoices):
        CALLS_US = "calls_us", "It calls the hub"
        PUSH = "push", "The hub sends to it"
        PULL = "pull", "The hub reads from it"
        PUSH_AND_PULL = "push_and_pull", "The hub sends to it and reads from it"

    class State(models.TextChoices):
        ACTIVE = "active", "Healthy"
        PAUSED = "paused", "Paused"
        NEEDS_REAUTH = "needs_reauth", "Needs login"

    class ConflictPolicy(models.TextChoices):
        HUB_WINS = "hub_wins", "The hub wins"
        PROVIDER_WINS = "provider_wins", "The system wins"
        ASK = "ask", "Ask a person"

    class DeletePolicy(models.TextChoices):
        UNLINK = "unlink", "Keep the customer, without a link"
        RECREATE = "recreate", "Create it there again"
        ARCHIVE = "archive", "Archive the customer"

    class ArchivePolicy(models.TextChoices):
        KEEP = "keep", "Leave the record there"
        DELETE = "delete", "Delete the record there"

    class CreatePolicy(models.TextChoices):
        BY_HAND = "by_hand", "When somebody pushes them"
        AUTOMATIC = "automatic", "As soon as they are in the hub"

    PUSHING: ClassVar = (Direction.PUSH, Direction.PUSH_AND_PULL)
    PULLING: ClassVar = (Direction.PULL, Direction.PUSH_AND_PULL)

    uid = models.UUIDField(default=uuid7, unique=True, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="connections", db_index=False)
    provider = models.CharField(max_length=32, help_text="The API that this system speaks.")
    name = models.CharField(max_length=100, help_text="Names the connection on screens and in commands.")
    account = models.CharField(
        max_length=128,
        blank=True,
        help_text="The account there: corporation_id (Commenda), merchant id (Cheqpay), company_id (RootFi).",
    )
    direction = models.CharField(max_length=16, choices=Direction, default=Direction.PUSH)
    base_url = models.CharField(
        blank=True,
        max_length=500,
        help_text="Where the API is, with its base path. A change of host clears the credentials.",
    )
    record_url = models.CharField(
        "address of a record there",
        max_length=500,
        blank=True,
        validators=[check_record_url],
        help_text=f"Where people see one record in that system, such as https://app.example.com/customers/{REMOTE_ID}.",
    )
    credentials = models.TextField(blank=True, editable=False)
    options = models.JSONField(
        default=dict, blank=True, help_text="What differs from the documented behaviour at this account."
    )
    conflict_policy = models.CharField(
        max_length=16,
        choices=ConflictPolicy,
        default=ConflictPolicy.HUB_WINS,
        help_text="Who wins where both sides changed the same field. Either way the change log keeps all values.",
    )
    field_policies = models.JSONField(
        "conflict policies by field",
        default=dict,
        blank=True,
        help_text='Fields that differ from it: {"phone": "provider_wins", "email": "ask"}.',
    )
    create_policy = models.CharField(
        "new customers are sent", max_length=16, choices=CreatePolicy, default=CreatePolicy.BY_HAND
    )
    delete_policy = models.CharField(
        "when a record is deleted there", max_length=16, choices=DeletePolicy, default=DeletePolicy.UNLINK
    )
    archive_policy = models.CharField(
        "when a customer is archived here", max_length=16, choices=ArchivePolicy, default=ArchivePolicy.KEEP
    )
    adopt_existing = models.BooleanField(
        default=False,
        help_text="Where the system refuses a create because it has such a record: link it, if nobody else is.",
    )
    pull_interval = models.PositiveIntegerField(
        null=True, blank=True, help_text="Seconds between pulls. Empty: only when somebody pulls."
    )
    pull_cron = models.CharField(
        "pull schedule",
        max_length=100,
        blank=True,
        help_text="Minute, hour, day, month, weekday, such as 30 2 * * 0. Comes before the interval.",
    )
    rate = models.FloatField(
        "calls per second",
        null=True,
        blank=True,
        help_text="The most that all workers together may make. Empty: no limit.",
    )
    burst = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="How many calls may follow at once after a pause. Empty: half a second's worth.",
    )
    day_limit = models.PositiveIntegerField(
        "calls per day",
        null=True,
        blank=True,
        help_text="The most in a day by UTC. The last tenth is left to what somebody waits for. Empty: no limit.",
    )
    state = models.CharField(max_length=16, choices=State, default=State.ACTIVE)
    state_reason = models.CharField(max_length=500, blank=True)
    paused_until = models.DateTimeField(null=True, blank=True, editable=False)  # NULL: until somebody resumes it
    opened_at = models.DateTimeField(
        default=timezone.now,
        null=True,
        editable=False,
        help_text="NULL: the first steps are not over. Nothing goes out or comes in by itself.",
    )
    setup = models.JSONField(default=dict, editable=False, help_text="What the first steps found, and when.")
    credentials_set_at = models.DateTimeField(null=True, editable=False)
    credentials_set_by = models.CharField(max_length=200, blank=True, editable=False)
    not_before = models.DateTimeField(null=True, blank=True, editable=False)
    bucket_calls = models.FloatField(null=True, editable=False)  # calls left in the bucket at `bucket_at`
    bucket_at = models.DateTimeField(null=True, editable=False)
    day_calls = models.PositiveIntegerField(default=0, editable=False)  # calls taken on `day`
    day = models.DateField(null=True, editable=False)
    breaker_calls = models.CharField(max_length=50, blank=True, editable=False)  # the last calls: "1" good, "0" failed
    breaker_until = models.DateTimeField(null=True, editable=False)  # set while the breaker is open
    breaker_trips = models.PositiveSmallIntegerField(default=0, editable=False)  # in a row: doubles the wait
    ramp = models.PositiveSmallIntegerField(null=True, editable=False)  # links still to be tried after a reconnect
    last_success_at = models.DateTimeField(null=True, editable=False)
    remote_account_id = models.CharField(
        max_length=255,
        blank=True,
        editable=False,
        help_text="The account that the credentials reach, as it says itself.",
    )
    login_token = models.CharField(max_length=32, blank=True, editable=False)  # who refreshes the credentials
    login_until = models.DateTimeField(null=True, editable=False)
    scan_generation = models.PositiveIntegerField(default=0, editable=False)  # complete lists that were begun
    next_pull_at = models.DateTimeField(null=True, blank=True, editable=False)
    checkpoint = models.JSONField(default=dict, blank=True, editable=False)
    pull_token = models.CharField(max_length=32, blank=True, editable=False)
    pull_until = models.DateTimeField(null=True, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.UniqueConstraint(fields=["organization", "provider", "account"], name="one_connection_per_account"),
            models.UniqueConstraint(fields=["organization", "name"], name="one_connection_per_name"),
        ]
        permissions = [("pull_connection", "Can pull customers from a connection")]

    def __str__(self) -> str:
        return self.name

    @property
    def public_id(self) -> str:
        return public_id("con", self.uid)

    @property
    def calls_us(self) -> bool:
        return self.direction == self.Direction.CALLS_US

    @property
    def pushes(self) -> bool:
        return self.direction in self.PUSHING

    @property
    def pulls(self) -> bool:
        return self.direction in self.PULLING

    def record_address(self, remote_id: str | None) -> str:
        """Where people see this record in that system; "" when that is not known."""
        if not remote_id or not self.record_url:
            return ""
        return self.record_url.replace(REMOTE_ID, quote(remote_id, safe=""))

    def _context(self) -> str:
        # Bound to the host: a changed address cannot be sent credentials that were meant for another.
        address = urlsplit(self.base_url)
        return f"connection/{self.uid}/{address.scheme}://{address.netloc}"

    def seal_credentials(self, values: Mapping[str, str]) -> None:
        """Replace the credentials; the caller saves. An empty mapping clears them."""
        self.credentials = seal(orjson.dumps(dict(values)).decode(), context=self._context()) if values else ""

    def unseal_credentials(self) -> dict[str, str]:
        """The credentials as entered. Raises sealing.UnsealError when key or host have changed since."""
        if not self.credentials:
            return {}
        values: dict[str, str] = orjson.loads(unseal(self.credentials, context=self._context()))
        return values


class ApiKey(models.Model):
    """What a system calls the hub with. The key itself is shown once and kept as a hash."""

    class State(models.TextChoices):
        ACTIVE = "active", "Active"
        EXPIRED = "expired", "Expired"
        REVOKED = "revoked", "Revoked"

    SCOPES: ClassVar = (
        "customers:read",
        "customers:write",
        "customers:push",
        "connections:read",
    )

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100, help_text="Who uses it. Shown in the change history.")
    scopes = models.JSONField(default=list, help_text="What it may do: " + ", ".join(SCOPES))
    prefix = models.CharField(max_length=16, editable=False)
    hash = models.CharField(max_length=64, editable=False, unique=True)
    rate = models.FloatField(
        "requests per second",
        null=True,
        blank=True,
        validators=[MinValueValidator(0)],
        help_text="Two seconds' worth may come at once. Empty: as the hub is set. 0: no limit.",
    )
    strict = models.BooleanField(
        default=False,
        help_text="Refuse what cannot be repeated safely: a POST without Idempotency-Key, a change without If-Match.",
    )
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    bucket_calls = models.FloatField(null=True, editable=False)  # requests left in the bucket at `bucket_at`
    bucket_at = models.DateTimeField(null=True, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    asked_at: datetime  # no column: the database's time when `find` read the rest

    class Meta:
        ordering = ["name"]
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"

    @staticmethod
    def hashed(key: str) -> str:
        return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

    @classmethod
    def issue(
        cls,
        *,
        organization: Organization,
        name: str,
        scopes: list[str] | None = None,
        expires_at: datetime | None = None,
        rate: float | None = None,
        strict: bool = False,
    ) -> tuple[ApiKey, str]:
        """A stored key and the secret that is never seen again."""
        secret = f"hub_{secrets.token_urlsafe(32)}"
        key = cls.objects.create(
            organization=organization,
            name=name,
            scopes=list(cls.SCOPES) if scopes is None else scopes,
            prefix=secret[:10],
            hash=cls.hashed(secret),
            expires_at=expires_at,
            rate=rate,
            strict=strict,
        )
        return key, secret

    @classmethod
    def find(cls, secret: str, *, now: datetime) -> ApiKey | None:
        """The usable key with this secret, organization loaded; None if it is blank, unknown, expired or revoked."""
        if not secret:
            return None
        wanted = cls.hashed(secret)
        for key in _KEY_BY_HASH(hash=wanted):
            if hmac.compare_digest(key.hash, wanted) and key.state(now=now) == cls.State.ACTIVE:
                return key
        return None

    @classmethod
    def _by_hash(cls) -> models.QuerySet[ApiKey]:
        keys = cls.objects.select_related("organization").annotate(asked_at=Now())
        return keys.filter(hash=Param("hash", models.CharField())).order_by()

    def state(self, *, now: datetime) -> State:
        if self.revoked_at:
            return self.State.REVOKED
        return self.State.EXPIRED if self.expires_at and self.expires_at <= now else self.State.ACTIVE


_KEY_BY_HASH = Prepared(ApiKey._by_hash, by_key=True)


class IdempotencyKey(models.Model):
    """A request that is carried out once: reserved before its effect, answered in the same transaction as the effect.

    `status` is NULL until it is answered. Whoever holds `token` may answer it.
    """

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+", db_index=False)
    api_key = models.ForeignKey(ApiKey, on_delete=models.CASCADE, related_name="+", db_index=False)
    route = models.CharField(max_length=255, help_text="Method and route.")
    key = models.CharField(max_length=255, help_text="As the caller chose it.")
    fingerprint = models.CharField(max_length=64, help_text="SHA-256 of address and body.")
    token = models.CharField(max_length=32)
    created_at = models.DateTimeField()
    reserved_at = models.DateTimeField()
    status = models.PositiveSmallIntegerField(null=True)
    headers = models.JSONField(default=dict)
    body = models.BinaryField(default=b"")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["api_key", "route", "key"], name="one_answer_per_idempotency_key"),
        ]
        indexes = [models.Index(fields=["created_at"], name="idempotency_age")]
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.route} {self.key}"


class SyncRun(models.Model):
    """One pull, push, import or API batch, with totals that add up to `planned` when it has ended."""

    class Kind(models.TextChoices):
        PUSH = "push", "Push"
        PULL = "pull", "Pull"
        IMPORT = "import", "Import"
        RECEIVE = "receive", "API batch"
        SYNC = "sync", "Sync"

    class State(models.TextChoices):
        QUEUED = "queued", "Queued"
        RUNNING = "running", "Running"
        SUCCEEDED = "succeeded", "Succeeded"
        PARTLY = "partly_succeeded", "Partly succeeded"
        FAILED = "failed", "Failed"
        CANCELLED = "cancelled", "Cancelled"

    TOTALS: ClassVar = ("created", "updated", "unchanged", "refused", "retrying", "uncertain", "skipped")

    public_id = models.CharField(max_length=16, unique=True, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="runs")
    connection = models.ForeignKey(Connection, null=True, blank=True, on_delete=models.CASCADE, related_name="runs")
    kind = models.CharField(max_length=16, choices=Kind)
    state = models.CharField(max_length=20, choices=State, default=State.QUEUED)
    actor_kind = models.CharField(max_length=16, choices=CustomerChange.Actor)
    actor_id = models.CharField(max_length=64, blank=True)
    actor_name = models.CharField(max_length=200)
    request_id = models.CharField(max_length=64, blank=True)
    request = models.JSONField(default=dict, help_text="What was asked for.")
    planned = models.PositiveIntegerField(default=0)
    created = models.PositiveIntegerField(default=0)
    updated = models.PositiveIntegerField(default=0)
    unchanged = models.PositiveIntegerField(default=0)
    refused = models.PositiveIntegerField(default=0)
    retrying = models.PositiveIntegerField(default=0)
    uncertain = models.PositiveIntegerField(default=0)
    skipped = models.PositiveIntegerField(default=0)
    problems = models.JSONField(default=list, help_text="The first hundred records that need attention, and why.")
    error = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["state", "id"], name="run_state"),
            models.Index(fields=["organization", "created_at"], name="run_by_day"),
        ]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.public_id}"

    @staticmethod
    def new_public_id() -> str:
        return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(16))

    @property
    def total(self) -> int:
        """How many records have an outcome."""
        return sum(getattr(self, name) for name in self.TOTALS)


class ImportFile(models.Model):
    """A file that somebody uploaded: kept from the preview until its rows are taken in, a day at the most."""

    uid = models.UUIDField(default=uuid7, unique=True, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+", db_index=False)
    connection = models.ForeignKey(Connection, null=True, on_delete=models.CASCADE, related_name="+")
    user_id = models.CharField(max_length=64, help_text="Who uploaded it: nobody else may have it taken in.")
    name = models.CharField(max_length=200)
    content = models.BinaryField()
    options = models.JSONField(default=dict)
    run = models.OneToOneField(SyncRun, null=True, on_delete=models.CASCADE, related_name="file")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        default_permissions = ()

    def __str__(self) -> str:
        return self.name


class CustomerLink(models.Model):
    """This customer in that system.

    Dirty when `pushed_version < needed_version`; due when it is dirty and `next_attempt_at` has come. A parked link has
    no `next_attempt_at`.
    """

    uid = models.UUIDField(default=uuid7, unique=True, editable=False)
    customer = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="links")
    connection = models.ForeignKey(Connection, on_delete=models.PROTECT, related_name="links", db_index=False)
    remote_id = models.CharField(max_length=REMOTE_ID_LENGTH, null=True, blank=True)  # noqa: DJ001 # NULL until known; "" would collide
    remote_data = models.JSONField(default=dict, blank=True, help_text="The document last seen, as it came.")
    base_local = models.JSONField(default=dict, help_text="The mapped fields as sent.")
    base_remote = models.JSONField(default=dict, help_text="The mapped fields as the system stored them.")
    remote_revision = models.CharField(max_length=255, blank=True)
    remote_created_at = models.DateTimeField(null=True, blank=True)
    sync_seq = models.PositiveIntegerField(default=0)
    pushed_version = models.PositiveIntegerField(default=0)
    needed_version = models.PositiveIntegerField(default=0)
    is_primary = models.BooleanField(
        "leading", default=False, help_text="Stands for the customer where a format shows one source only."
    )
    is_duplicate = models.BooleanField(
        default=False, help_text="A second record of one customer in one system; never pushed."
    )
    original_customer = models.ForeignKey(
        Customer,
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="moved_links",
        db_index=False,
        help_text="Whose link this was before the customer was merged.",
    )
    is_active = models.BooleanField(default=True)
    state = models.CharField(max_length=16, choices=LinkState, default=LinkState.OPEN)
    error = models.CharField(max_length=500, blank=True)
    error_field = models.CharField(max_length=64, blank=True)
    conflicts = models.JSONField(
        default=dict, blank=True, help_text='Fields that wait for a person: {field: {"base", "here", "there", "at"}}.'
    )
    attempts = models.PositiveIntegerField(default=0)
    failing_since = models.DateTimeField(null=True, blank=True)
    fingerprint = models.CharField(max_length=16, blank=True, help_text="Equal for errors of one cause.")
    crashes = models.PositiveSmallIntegerField(default=0)  # times that a worker or connector died on it
    urgent = models.BooleanField(default=False, help_text="Goes before the others: somebody waits for it.")
    next_attempt_at = models.DateTimeField(null=True, blank=True)
    hold_until = models.DateTimeField(
        null=True, blank=True, help_text="Until then a lost request may still be applied."
    )
    epoch = models.PositiveIntegerField(default=1, help_text="Counts the creates that were proved not to exist there.")
    lease_token = models.CharField(max_length=32, blank=True)
    lease_until = models.DateTimeField(null=True, blank=True)
    run = models.ForeignKey(
        SyncRun,
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="links",
        db_index=False,
        help_text="The run that waits for the outcome of this link.",
    )
    synced_at = models.DateTimeField(null=True, blank=True)
    seen_generation = models.PositiveIntegerField(default=0)  # the last complete list that showed it
    former_remote_id = models.CharField(max_length=REMOTE_ID_LENGTH, blank=True)
    tombstone = models.JSONField(
        default=dict, blank=True, help_text="What was deleted there, when, and how that is known."
    )
    deleted_at = models.DateTimeField(null=True, blank=True, help_text="Set: this link is a tombstone.")
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["connection", "remote_id"], name="one_link_per_remote_id"),
            models.UniqueConstraint(
                fields=["connection", "customer"],
                condition=Q(is_duplicate=False),
                name="one_link_per_customer_and_connection",
            ),
            models.UniqueConstraint(
                fields=["customer"], condition=Q(is_primary=True), name="one_primary_link_per_customer"
            ),
        ]
        indexes = [
            models.Index(fields=["connection", "id"], name="link_page"),
            models.Index(
                "connection",
                F("urgent").desc(),
                "next_attempt_at",
                name="link_due",
                condition=Q(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False),
            ),
            models.Index(fields=["connection", "updated_at", "id"], name="link_changed"),
            models.Index(fields=["connection", "created_at", "id"], name="link_created"),
            models.Index(
                fields=["connection", "remote_created_at"],
                name="link_created_there",
                condition=Q(remote_created_at__isnull=False),
            ),
            # Few links have one: an index of all would be written for the others, too.
            models.Index(fields=["run"], name="link_run", condition=Q(run__isnull=False)),
            models.Index(fields=["original_customer"], name="link_moved", condition=Q(original_customer__isnull=False)),
            models.Index(fields=["connection"], name="link_duplicate", condition=Q(is_duplicate=True)),
            models.Index(fields=["connection"], name="link_tombstone", condition=Q(deleted_at__isnull=False)),
            models.Index(fields=["connection", "fingerprint"], name="link_rejected", condition=Q(state="rejected")),
            models.Index(fields=["connection", "state"], name="link_parked", condition=Q(state__in=PARKED)),
            models.Index(
                fields=["connection", "former_remote_id"], name="link_former_id", condition=~Q(former_remote_id="")
            ),
            models.Index(fields=["connection", "updated_at", "id"], name="link_needs_you", condition=MAY_NEED_SOMEBODY),
        ]
        default_permissions = ("view",)
        permissions = [("push_customerlink", "Can push customers to connected systems")]

    def __str__(self) -> str:
        return f"{self.customer} in {self.connection}"

    @property
    def is_dirty(self) -> bool:
        return self.pushed_version < self.needed_version

    def status_key(self, *, now: datetime) -> str:
        """The key in `states.STATUSES` that this link is shown as. Needs `connection` loaded."""
        if self.is_duplicate:
            return "duplicate"
        if self.deleted_at:
            return "remote_deleted"
        if self.connection.calls_us:
            return "calls_us"
        if self.connection.state == Connection.State.NEEDS_REAUTH:
            return "reconnect"
        if self.connection.state == Connection.State.PAUSED:
            return "paused"
        if self.state == LinkState.UNCERTAIN and self.next_attempt_at is not None:
            return "checking"
        if self.state in PARKED:
            return str(self.state)
        if not self.is_dirty:
            return "conflict" if self.conflicts else "in_sync"
        if self.lease_until and self.lease_until > now:
            return "sending"
        if self.connection.not_before is not None and self.connection.not_before > now:
            return "rate_limited"
        return "retrying" if self.state == LinkState.RETRYING else "waiting"

    def status(self, *, now: datetime) -> Status:
        return STATUSES[self.status_key(now=now)]

    def sentence(self, *, now: datetime, key: str = "") -> str:
        """What is going on, in words for staff; with `key`, what there is to say of that status."""
        shown = "%Y-%m-%d %H:%M:%S UTC"
        status = STATUSES[key] if key else self.status(now=now)
        # Why none of the connection's links moves, unless it is this one alone that is paused.
        whole = status.key in ("paused", "reconnect") and self.connection.state != Connection.State.ACTIVE
        reason = self.connection.state_reason if whole else self.error
        return status.sentence.format(
            system=self.connection.name,
            time=self.synced_at.strftime(shown) if self.synced_at else "its creation",
            next=self.next_attempt_at.strftime(shown) if self.next_attempt_at else "the next pass",
            wait=self.connection.not_before.strftime(shown) if self.connection.not_before else "later",
            field=", ".join(self.conflicts) or self.error_field or "the record",
            error=reason or "no reason given",
        )


class PushIntent(models.Model):
    """What may have been sent. Committed before the first byte leaves, with the payload frozen."""

    class Kind(models.TextChoices):
        CREATE = "create", "Create"
        UPDATE = "update", "Update"
        DELETE = "delete", "Delete"

    class Outcome(models.TextChoices):
        OPEN = "open", "Open"
        OK = "ok", "Done"
        FAILED = "failed", "Failed"
        UNCERTAIN = "uncertain", "Uncertain"

    link = models.ForeignKey(CustomerLink, on_delete=models.CASCADE, related_name="intents")
    kind = models.CharField(max_length=8, choices=Kind)
    key = models.UUIDField(default=uuid7, help_text="The idempotency key, where the system takes one.")
    epoch = models.PositiveIntegerField(default=1)
    payload = models.JSONField()
    sent_values = models.JSONField(help_text="The mapped fields of the customer that the payload was made of.")
    version = models.PositiveIntegerField(help_text="The customer's version that was read for it.")
    outcome = models.CharField(max_length=16, choices=Outcome, default=Outcome.OPEN)
    hold_until = models.DateTimeField(null=True, blank=True)
    lost = models.PositiveSmallIntegerField(default=0)  # sendings whose answer never came
    replayed = models.BooleanField(default=False)  # the key brings back a stored failure
    look_ups = models.PositiveSmallIntegerField(default=0)
    remote_id = models.CharField(max_length=REMOTE_ID_LENGTH, blank=True)  # named by an answer that came too late
    first_sent_at = models.DateTimeField()
    sent_at = models.DateTimeField()
    answered_at = models.DateTimeField(null=True, blank=True)
    status = models.PositiveSmallIntegerField(null=True, blank=True)
    error = models.CharField(max_length=500, blank=True)
    remote_request_id = models.CharField(max_length=128, blank=True)

    class Meta:
        indexes = [
            models.Index(fields=["link"], name="intent_open", condition=Q(outcome__in=("open", "uncertain"))),
        ]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


class Conflict(models.Model):
    """A field that was changed on both sides: all three values, and who won. One row each time it happens."""

    class Outcome(models.TextChoices):
        HUB = "hub", "The hub's value stayed"
        SYSTEM = "system", "The system's value was taken"
        WAITING = "waiting", "Waits for a person"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+", db_index=False)
    connection = models.ForeignKey(Connection, on_delete=models.CASCADE, related_name="conflicts", db_index=False)
    link = models.ForeignKey(CustomerLink, on_delete=models.CASCADE, related_name="conflict_log")
    field = models.CharField(max_length=64)
    base = models.JSONField(null=True)
    here = models.JSONField(null=True)
    there = models.JSONField(null=True)
    outcome = models.CharField(max_length=16, choices=Outcome)
    at = models.DateTimeField()
    resolved_at = models.DateTimeField(null=True, blank=True)
    resolved_by = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["connection", "-id"], name="conflict_list"),
            models.Index(
                fields=["connection", "link"], name="conflict_waiting", condition=Q(outcome="waiting", resolved_at=None)
            ),
        ]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.field} of {self.link}"


class Issue(models.Model):
    """Something that a person has to see to: one per connection, kind and cause, however often it happens."""

    class Kind(models.TextChoices):
        LOGIN = "login", "Login ended"
        WRONG_ACCOUNT = "wrong_account", "Another account"
        MASS_DELETE = "mass_delete", "Too many deletes"
        REJECTED = "rejected", "Refused there"
        POISON = "poison", "Keeps failing"
        CONNECTOR = "connector", "Connector fault"
        DUPLICATE = "duplicate", "Two records of one customer"
        ORPHAN = "orphan", "Record without a link"
        FIGHT = "fight", "Two systems overwrite each other"
        RATE_LIMIT = "rate_limit", "Absurd waiting time"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="issues", db_index=False)
    connection = models.ForeignKey(Connection, on_delete=models.CASCADE, related_name="issues", db_index=False)
    kind = models.CharField(max_length=16, choices=Kind)
    fingerprint = models.CharField(max_length=64, blank=True)
    message = models.CharField(max_length=500)
    details = models.JSONField(default=dict)
    count = models.PositiveIntegerField(default=1)
    first_at = models.DateTimeField()
    last_at = models.DateTimeField()
    resolved_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-last_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["connection", "kind", "fingerprint"],
                condition=Q(resolved_at=None),
                name="one_open_issue_per_cause",
            ),
        ]
        indexes = [models.Index(fields=["organization", "-last_at"], name="issue_list")]
        default_permissions = ("view", "change")

    def __str__(self) -> str:
        # Not the message: it may quote personal data, and this is shown to whoever may see the issue.
        return self.get_kind_display()


class Heartbeat(models.Model):
    """A process that carries out due work, and when it last said so."""

    name = models.CharField(max_length=200, unique=True, help_text="Host and process.")
    kind = models.CharField(max_length=32, help_text="What it was started as.")
    started_at = models.DateTimeField()
    seen_at = models.DateTimeField()

    class Meta:
        ordering = ["-seen_at"]
        default_permissions = ()

    def __str__(self) -> str:
        return self.name

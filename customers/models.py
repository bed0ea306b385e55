"""The golden record: whose customers they are, what is known of each, and every change with its author.

Only `customers.editing` writes customers and their changes.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser
from django.db import models

from customers.ids import public_id, uuid7


class OrganizationQuerySet(models.QuerySet["Organization"]):
    def of(self, user: AbstractBaseUser | AnonymousUser) -> OrganizationQuerySet:
        """The organizations whose customers this person may work with: a superuser's are all."""
        if getattr(user, "is_superuser", False):
            return self
        return self.filter(members=user.pk) if user.pk else self.none()


class Organization(models.Model):
    """The tenant: one business whose customers these are."""

    name = models.CharField(max_length=200)
    slug = models.SlugField(max_length=60, unique=True, help_text="Names the organization in commands.")
    country = models.CharField(
        max_length=2,
        blank=True,
        help_text="ISO 3166-1 alpha-2. Phone numbers without a country code are read as numbers of this country.",
    )
    members = models.ManyToManyField(
        settings.AUTH_USER_MODEL,
        blank=True,
        related_name="organizations",
        help_text="Staff who may work with these customers.",
    )
    created_at = models.DateTimeField(auto_now_add=True)

    objects = OrganizationQuerySet.as_manager()

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class Customer(models.Model):
    """One golden record. Texts are kept as given; the `_key` and `_code` columns beside them are for looking up."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="customers", db_index=False)
    name = models.CharField(max_length=255, help_text="The canonical name of the person or company.")
    first_name = models.CharField(max_length=255, blank=True)
    last_name = models.CharField(max_length=255, blank=True)
    email = models.CharField("e-mail", max_length=254, blank=True)
    phone = models.CharField(max_length=64, blank=True)
    address_line1 = models.CharField("address line 1", max_length=255, blank=True)
    address_line2 = models.CharField("address line 2", max_length=255, blank=True)
    address_city = models.CharField(max_length=255, blank=True)
    address_state = models.CharField(max_length=255, blank=True)
    address_postal_code = models.CharField(max_length=32, blank=True)
    address_country = models.CharField(max_length=64, blank=True)
    shipping_address_line1 = models.CharField("shipping address line 1", max_length=255, blank=True)
    shipping_address_line2 = models.CharField("shipping address line 2", max_length=255, blank=True)
    shipping_address_city = models.CharField(max_length=255, blank=True)
    shipping_address_state = models.CharField(max_length=255, blank=True)
    shipping_address_postal_code = models.CharField(max_length=32, blank=True)
    shipping_address_country = models.CharField(max_length=64, blank=True)
    currency = models.CharField(
        max_length=64, blank=True, help_text="ISO 4217 code, or the id that a system uses for its currency."
    )
    notify_email = models.BooleanField("notify by e-mail", default=False)
    notify_phone = models.BooleanField("notify by phone", default=False)
    is_active = models.BooleanField("active", default=True)
    custom_fields = models.JSONField(default=dict, blank=True)

    name_key = models.CharField(max_length=255, editable=False)
    email_key = models.CharField(max_length=254, editable=False, blank=True)
    phone_key = models.CharField(
        max_length=64,
        editable=False,
        blank=True,
        help_text="E.164, or the digits alone where the text does not tell the country.",
    )
    address_country_code = models.CharField(max_length=2, editable=False, blank=True)
    shipping_address_country_code = models.CharField(max_length=2, editable=False, blank=True)

    version = models.PositiveIntegerField(default=1, editable=False)
    created_at = models.DateTimeField(editable=False)
    updated_at = models.DateTimeField(editable=False)
    archived_at = models.DateTimeField(null=True, blank=True, editable=False)
    merged_into = models.ForeignKey(
        "self",
        null=True,
        blank=True,
        editable=False,
        on_delete=models.PROTECT,
        related_name="merged",
        db_index=False,
        help_text="The survivor that stands for this record.",
    )

    class Meta:
        indexes = [
            # What a list leaves out stands in the index, so that counting and skipping read nothing else.
            models.Index(fields=["organization", "id", "archived_at", "merged_into"], name="customer_page"),
            models.Index(fields=["organization", "id"], name="customer_inactive", condition=models.Q(is_active=False)),
            models.Index(fields=["merged_into"], name="customer_merged", condition=models.Q(merged_into__isnull=False)),
            models.Index(fields=["organization", "name_key"], name="customer_name"),
            models.Index(
                fields=["organization", "email_key"], name="customer_email", condition=~models.Q(email_key="")
            ),
            models.Index(
                fields=["organization", "phone_key"], name="customer_phone", condition=~models.Q(phone_key="")
            ),
            models.Index(fields=["-updated_at", "-id"], name="customer_recent"),
            # Likewise: what has changed since is told by the index alone.
            models.Index(
                fields=["organization", "-updated_at", "-id", "archived_at", "merged_into"], name="customer_recent_of"
            ),
            models.Index(
                fields=["organization", "address_country_code", "-updated_at", "-id"],
                name="customer_country",
                condition=~models.Q(address_country_code=""),
            ),
            models.Index(
                fields=["organization", "-updated_at"],
                name="customer_archived",
                condition=models.Q(archived_at__isnull=False),
            ),
        ]
        permissions = [
            ("import_customer", "Can import customers"),
            ("export_customer", "Can export customers"),
            ("view_personal_data", "Can see personal data"),
            ("reveal_personal_data", "Can reveal one customer's personal data, which is logged"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def public_id(self) -> str:
        return public_id("cust", self.id)


class CurrentTransaction(models.Func):
    """The number of the writing transaction on PostgreSQL; 0 on SQLite, which lets one transaction write at a time."""

    template = "0"
    output_field = models.BigIntegerField()

    def as_postgresql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="pg_current_xact_id()::text::bigint", **context)


class CustomerChange(models.Model):
    """One version of one customer: who or what, when, why, which fields, from what to what. Never edited.

    Ordered by `tx` and `id` the rows are a feed: on PostgreSQL, rows of lower `tx` than every running transaction are
    all there, and whatever is still to come sorts after them. Ids alone would not do: a transaction that commits late
    may have taken its ids early. A trigger keeps `tx` from falling between two versions of one customer.
    """

    class Actor(models.TextChoices):
        USER = "user", "Person"
        API_KEY = "api_key", "API key"
        CONNECTION = "connection", "System"
        COMMAND = "command", "Command"

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+", db_index=False)
    customer = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="changes", db_index=False)
    version = models.PositiveIntegerField()
    at = models.DateTimeField()
    actor_kind = models.CharField(max_length=16, choices=Actor)
    actor_id = models.CharField(max_length=64, blank=True)
    actor_name = models.CharField(max_length=200)
    request_id = models.CharField(max_length=64, blank=True)
    message = models.CharField(max_length=500, blank=True)
    changes = models.JSONField(help_text="Field name to [old, new].")
    tx = models.BigIntegerField(db_default=CurrentTransaction(), editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["customer", "version"], name="one_change_per_version"),
        ]
        indexes = [
            models.Index(fields=["organization", "id"], name="change_feed"),
            models.Index(fields=["organization", "tx", "id"], name="change_order"),
            models.Index(fields=["organization", "actor_kind", "id"], name="change_author"),
        ]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"version {self.version} by {self.actor_name}"


class MergeRecord(models.Model):
    """One merge of two customers: what both were before, and what it takes to undo it."""

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+", db_index=False)
    survivor = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="merges")
    loser = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="merge_records")
    survivor_before = models.JSONField(help_text="The survivor's fields before the merge.")
    loser_before = models.JSONField(help_text="The fields of the customer that was merged into it.")
    survivor_version = models.PositiveIntegerField(help_text="The survivor's version that the merge made.")
    loser_version = models.PositiveIntegerField(help_text="The loser's version that the merge made.")
    changes = models.JSONField(help_text="What the merge changed on the survivor: field name to [old, new].")
    followers = models.JSONField(default=list, help_text="Customers that had been merged into the loser before.")
    notes = models.JSONField(
        default=dict, help_text="What others that hold something of the customers need to undo it."
    )
    at = models.DateTimeField()
    actor_kind = models.CharField(max_length=16, choices=CustomerChange.Actor)
    actor_id = models.CharField(max_length=64, blank=True)
    actor_name = models.CharField(max_length=200)
    undone_at = models.DateTimeField(null=True, blank=True)
    undone_by = models.CharField(max_length=200, blank=True)
    undone_version = models.PositiveIntegerField(null=True, help_text="The survivor's version that undid it.")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["loser"], condition=models.Q(undone_at=None), name="merged_once"),
        ]
        indexes = [models.Index(fields=["organization", "-id"], name="merge_list")]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.loser} merged into {self.survivor}"


class Note(models.Model):
    """What staff wrote down about a customer without changing it. Never edited."""

    customer = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="notes")
    at = models.DateTimeField()
    author_id = models.CharField(max_length=64)
    author_name = models.CharField(max_length=200)
    text = models.CharField(max_length=2000)

    class Meta:
        default_permissions = ("add", "view")

    def __str__(self) -> str:
        return f"note by {self.author_name}"


class Reveal(models.Model):
    """Somebody without the right to see personal data looked at one customer's, once, and why. Never edited."""

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+", db_index=False)
    customer = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="reveals")
    at = models.DateTimeField()
    user_id = models.CharField(max_length=64)
    user_name = models.CharField(max_length=200)
    reason = models.CharField(max_length=500, blank=True)
    request_id = models.CharField(max_length=64, blank=True)

    class Meta:
        indexes = [models.Index(fields=["organization", "-id"], name="reveal_list")]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.customer} revealed to {self.user_name}"

"""The screens of connections: their settings, their state, and the buttons that test, pull, push and pause."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import flatten_fieldsets
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import Field
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, reverse
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from connectors import login
from connectors.admin import checking, overview, testing
from connectors.admin.badges import connection_badge, run_badge, summary
from connectors.admin.filters import counts_by_status
from connectors.admin.issues import words_of
from connectors.admin.needs import counted
from connectors.admin.wizard import FirstSteps, canary_succeeded
from connectors.exceptions import ConnectionUnusable, ConnectorError
from connectors.guard import check_url
from connectors.models import Connection, CustomerLink, Issue
from connectors.provider import Provider
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import HEALTH, health_key, health_sentence
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.request import request as request_push
from connectors.sync.schedule import problems_of_cron
from customers.admin.filters import OrganizationFilter
from customers.admin.own import OwnAdmin
from customers.admin.person import actor_of
from customers.models import Customer
from customers.privacy import sees
from customers.theme import CheckboxInput, ModelForm, PasswordInput, Select

# One press of "Pull now" reads this many; the schedule and the command read everything.
PULL_ROWS = 500
SHORTEST_INTERVAL = 60
RUNS_SHOWN, ISSUES_SHOWN = 5, 10
# All names that any provider's credentials have: a new connection's provider is chosen in the same form.
CREDENTIALS = tuple(dict.fromkeys(name for provider in PROVIDERS.values() for name in provider.credentials))
SECRETS = tuple(f"credential_{name}" for name in CREDENTIALS)


def origin(address: str) -> tuple[str, str]:
    """What credentials are bound to."""
    parts = urlsplit(address)
    return parts.scheme, parts.netloc


class ConnectionForm(ModelForm):
    """A connection's settings. Credentials go in and never come out: the form says only whether any are kept."""

    clear_credentials = forms.BooleanField(
        required=False, help_text="Forget the credentials that are kept.", widget=CheckboxInput
    )

    class Meta:
        model = Connection
        fields = (
            "organization",
            "provider",
            "name",
            "account",
            "direction",
            "base_url",
            "record_url",
            "conflict_policy",
            "field_policies",
            "create_policy",
            "delete_policy",
            "archive_policy",
            "adopt_existing",
            "pull_cron",
            "pull_interval",
            "rate",
            "burst",
            "day_limit",
            "options",
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kept = "Set. Leave empty to keep it." if self.instance.credentials else "Not set."
        if self.instance.credentials and self.instance.credentials_set_at:
            by, at = self.instance.credentials_set_by, self.instance.credentials_set_at
            kept = f"{kept} {by} entered it on {at:%Y-%m-%d}."
        for field, name in zip(SECRETS, CREDENTIALS, strict=True):
            self.fields[field] = forms.CharField(
                required=False,
                label=name.replace("_", " ").capitalize().replace("Api", "API"),
                help_text=f"{kept} Never shown.",
                widget=PasswordInput(attrs={"autocomplete": "new-password"}),
            )

    @property
    def provider(self) -> Provider | None:
        return PROVIDERS.get(self.cleaned_data.get("provider") or self.instance.provider)

    def clean_account(self) -> str:
        account: str = self.cleaned_data["account"].strip()
        provider = self.provider
        if provider and provider.account_label and not account:
            raise ValidationError(f"{provider.label} needs its {provider.account_label}.")
        return account

    def clean_base_url(self) -> str:
        address: str = self.cleaned_data["base_url"]
        try:
            origin(address)
        except ValueError:
            raise ValidationError("This is no address. Enter one such as https://api.example.com/v1.") from None
        return address

    def clean_pull_interval(self) -> int | None:
        interval: int | None = self.cleaned_data["pull_interval"]
        if interval is not None and interval < SHORTEST_INTERVAL:
            raise ValidationError(f"Use at least {SHORTEST_INTERVAL} seconds.")
        return interval

    def clean_pull_cron(self) -> str:
        text = " ".join(self.cleaned_data["pull_cron"].split())
        if text and (wrong := problems_of_cron(text)):
            raise ValidationError(wrong)
        return text

    def clean_rate(self) -> float | None:
        rate: float | None = self.cleaned_data["rate"]
        if rate is not None and not 0 < rate <= 10_000:
            raise ValidationError("Give how many calls a second may be made, such as 10, or nothing.")
        return rate

    def clean_burst(self) -> int | None:
        burst: int | None = self.cleaned_data["burst"]
        if burst == 0:
            raise ValidationError("Give at least 1, or nothing.")
        return burst

    def clean_day_limit(self) -> int | None:
        limit: int | None = self.cleaned_data["day_limit"]
        if limit == 0:
            raise ValidationError("Give at least 1, or nothing.")
        return limit

    def clean_field_policies(self) -> dict[str, str]:
        chosen = self.cleaned_data["field_policies"] or {}
        policies = ", ".join(Connection.ConflictPolicy.values)
        if not isinstance(chosen, dict) or not set(chosen.values()) <= set(Connection.ConflictPolicy.values):
            raise ValidationError(f'Give an object such as {{"phone": "ask"}}. There are: {policies}.')
        known = self.provider.fields if self.provider else frozenset(chosen)
        if unknown := sorted(chosen.keys() - known):
            raise ValidationError(f"Unknown: {', '.join(unknown)}. Its fields are: {', '.join(sorted(known))}.")
        return chosen

    def clean_options(self) -> dict[str, bool]:
        options = self.cleaned_data["options"] or {}
        if not isinstance(options, dict) or not all(isinstance(value, bool) for value in options.values()):
            raise ValidationError('Give an object of true and false, such as {"upsert": true}.')
        known = self.provider.options if self.provider else {}
        if unknown := [name for name in options if name not in known]:
            offered = ", ".join(known) or "none"
            raise ValidationError(f"Unknown: {', '.join(unknown)}. This provider understands: {offered}.")
        return options

    def clean(self) -> None:
        direction, address = self.cleaned_data.get("direction"), self.cleaned_data.get("base_url")
        if direction != Connection.Direction.CALLS_US and "base_url" in self.cleaned_data:
            if not address:
                self.add_error("base_url", "The hub calls this system: enter the address of its API.")
            else:
                try:
                    check_url(address)
                except ConnectionUnusable as error:
                    self.add_error("base_url", error.message)
        provider = self.provider
        if direction in Connection.PULLING and provider and "options" in self.cleaned_data:
            probe = Connection(provider=provider.slug, options=self.cleaned_data["options"])
            if not provider.capabilities(probe).lists:
                self.add_error("direction", f"{provider.label} documents no list of customers to read.")

    def _get_validation_exclusions(self) -> set[str]:
        # Read-only fields are left out by default, and with them the rule that names and accounts are unique.
        left_out: set[str] = super()._get_validation_exclusions()  # type: ignore[misc] # the stubs lack it
        return left_out - {"organization", "provider"}

    def entered(self) -> dict[str, str]:
        """The credentials that were typed in."""
        return {name: value for name in CREDENTIALS if (value := self.cleaned_data.get(f"credential_{name}"))}


@admin.register(Connection)
class ConnectionAdmin(FirstSteps, OwnAdmin):
    form = ConnectionForm
    change_form_template = "connectors/connection_form.html"
    list_display = ["name", "provider_label", "organization", "direction", "badge", "links_by_state"]
    list_select_related = ["organization"]
    list_filter = [OrganizationFilter, "direction", "state"]
    search_fields = ["name", "account"]

    # List

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changes = super().get_changelist_instance(request)
        changes.result_list = list(changes.result_list)
        counts = counts_by_status(changes.result_list, now=timezone.now())
        waits = counted(changes.result_list)
        for connection in changes.result_list:
            connection.counts = counts.get(connection.pk, {})
            connection.parked = overview.parked(waits, connection)
        return changes

    @admin.display(description="System", ordering="provider")
    def provider_label(self, connection: Connection) -> str:
        provider = PROVIDERS.get(connection.provider)
        return provider.label if provider else connection.provider

    @admin.display(description="State", ordering="state")
    def badge(self, connection: Any) -> str:
        return connection_badge(connection, parked=connection.parked, now=timezone.now())

    @admin.display(description="Customers")
    def links_by_state(self, connection: Any) -> str:
        return summary(connection.counts) if connection.counts else "–"

    # Form

    def get_fieldsets(self, request: HttpRequest, obj: Connection | None = None) -> Any:
        may_edit = self.has_change_permission(request, obj) if obj else self.has_add_permission(request)
        secrets = [*SECRETS, *(["clear_credentials"] if obj else [])] if may_edit else []
        provider = "provider_label" if obj else "provider"
        return [
            ("System", {"fields": ["organization", provider, "name", "account", "direction"]}),
            ("Address and login", {"fields": ["base_url", "record_url", *secrets]}),
            ("Conflicts", {"fields": ["conflict_policy", "field_policies"]}),
            (
                "Creating and deleting",
                {"fields": ["create_policy", "adopt_existing", "delete_policy", "archive_policy"]},
            ),
            (
                "Schedule and limits",
                {"fields": ["pull_cron", "pull_interval", "rate", "burst", "day_limit", "options"]},
            ),
        ]

    def get_form(self, request: HttpRequest, obj: Connection | None = None, change: bool = False, **kwargs: Any) -> Any:
        # The form makes the inputs of credentials itself: they are no columns.
        names = flatten_fieldsets(self.get_fieldsets(request, obj))
        kwargs["fields"] = [name for name in names if name not in SECRETS]
        return super().get_form(request, obj, change, **kwargs)

    def get_readonly_fields(self, request: HttpRequest, obj: Connection | None = None) -> list[str]:
        return ["organization", "provider_label"] if obj else []

    def formfield_for_dbfield(self, db_field: Field[Any, Any], request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.name == "provider":
            choices = [("", "Choose"), *((slug, provider.label) for slug, provider in PROVIDERS.items())]
            return forms.ChoiceField(choices=choices, widget=Select, help_text=db_field.help_text)
        if db_field.name == "base_url":
            examples = ", ".join(f"{p.base_url} ({p.label})" for p in PROVIDERS.values() if p.base_url)
            kwargs["help_text"] = f"{db_field.help_text} For example {examples}."
        field = super().formfield_for_dbfield(db_field, request, **kwargs)
        if db_field.name == "options" and field is not None:
            offered = [f"{p.label}, {name}: {text}" for p in PROVIDERS.values() for name, text in p.options.items()]
            field.help_text = " ".join([str(db_field.help_text), 'An object such as {"name": true}.', *offered])
        return field

    def save_model(self, request: HttpRequest, obj: Connection, form: Any, change: bool) -> None:
        if not change:
            obj.seal_credentials(form.entered())
            if obj.credentials:
                obj.credentials_set_at, obj.credentials_set_by = timezone.now(), actor_of(request).name[:200]
            if not obj.calls_us:
                obj.opened_at = None  # until the first steps are over
            obj.save()
            return
        kept = self._kept_credentials(obj)
        moved = origin(form.initial.get("base_url") or "") != origin(obj.base_url)
        entered = form.entered()
        touched = {name for name in form.changed_data if name in ConnectionForm.Meta.fields}
        if form.cleaned_data.get("clear_credentials") or entered or (moved and obj.credentials):
            base = {} if moved or form.cleaned_data.get("clear_credentials") else kept
            obj.seal_credentials(login.merged(base, entered))
            obj.credentials_set_at, obj.credentials_set_by = timezone.now(), actor_of(request).name[:200]
            touched |= {"credentials", "credentials_set_at", "credentials_set_by"}
            if moved and not entered:
                text = "The address leads to another host: the credentials were cleared. Enter those of the new host."
                self.message_user(request, text, messages.WARNING)
        if "direction" in touched and form.initial.get("direction") == Connection.Direction.CALLS_US:
            obj.opened_at = None
            touched.add("opened_at")
        if touched & {"pull_cron", "pull_interval"}:
            obj.next_pull_at = None  # the worker finds the next time by the new schedule
            touched.add("next_pull_at")
        # Only what was edited: a pull may be writing its checkpoint to the same row.
        obj.save(update_fields=[*touched, "updated_at"])
        if entered and obj.state == Connection.State.NEEDS_REAUTH:
            # Once no transaction is open: the new login must be shown to reach the same account.
            transaction.on_commit(lambda: self._told(request, self._test(obj)))

    def _told(self, request: HttpRequest, outcome: tuple[int, str]) -> None:
        level, text = outcome
        self.message_user(request, text, level)

    def _kept_credentials(self, obj: Connection) -> dict[str, str]:
        try:
            return Connection.objects.get(pk=obj.pk).unseal_credentials()
        except UnsealError:
            return {}

    def has_delete_permission(self, request: HttpRequest, obj: Connection | None = None) -> bool:
        if obj is None or not super().has_delete_permission(request, obj):
            return False
        return not obj.links.exists() and not obj.runs.exists()

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Connection | None = None,
    ) -> HttpResponse:
        if obj is not None:
            context |= self._facts(request, obj, now=timezone.now())
        return super().render_change_form(request, context, add, change, form_url, obj)

    def _facts(self, request: HttpRequest, obj: Connection, *, now: datetime) -> dict[str, Any]:
        """What the page tells besides the settings, in a constant number of queries."""
        provider = PROVIDERS.get(obj.provider)
        queue = overview.queue(obj, clear=sees(request.user), now=now)
        parked, oldest_due = queue.parked, queue.oldest_due
        may_see_customers = request.user.has_perm("customers.view_customer")
        example = mapping = None
        if provider is not None and may_see_customers:
            example = overview.example_of(obj, request.GET.get("example", ""))
            mapping = overview.mapping(provider, obj, example=example, clear=sees(request.user))
        return {
            "badge": connection_badge(obj, parked=parked, oldest_due=oldest_due, now=now),
            "health": HEALTH[health_key(obj, parked=parked, oldest_due=oldest_due, now=now)],
            "health_sentence": health_sentence(obj, parked=parked, oldest_due=oldest_due, now=now),
            "queue": queue,
            "issues": [
                (issue, words_of(issue, clear=sees(request.user)))
                for issue in Issue.objects.filter(connection=obj, resolved_at=None)[:ISSUES_SHOWN]
            ]
            if request.user.has_perm("connectors.view_issue")
            else [],
            "limits": overview.limit_facts(obj, now=now) if not obj.calls_us else [],
            "abilities": list(overview.abilities(provider, obj)) if provider and not obj.calls_us else [],
            "mapping": mapping if not obj.calls_us else None,
            "example": example,
            "example_missing": bool(request.GET.get("example")) and example is None,
            "runs": [(run, run_badge(run)) for run in obj.runs.defer("problems", "request")[:RUNS_SHOWN]],
            "can_change": self.has_change_permission(request, obj),
            "can_pull": obj.pulls and self.has_pull_permission(request),
            "can_push": obj.pushes and self.has_push_permission(request),
            "can_check": not obj.calls_us and provider is not None and checking.may_check(request.user),
            "can_view_runs": request.user.has_perm("connectors.view_syncrun"),
            "can_view_links": request.user.has_perm("connectors.view_customerlink"),
            "active": obj.state == Connection.State.ACTIVE,
            "provider": provider,
        }

    # Buttons

    def has_pull_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.pull_connection"))

    def has_push_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.push_customerlink"))

    def get_urls(self) -> list[URLPattern]:
        return [
            self.posted("test", self.test_view),
            self.posted("check", self.check_view),
            self.posted("pull", self.pull_view),
            self.posted("push", self.push_view),
            self.posted("pause", self.pause_view),
            self.posted("resume", self.resume_view),
            *super().get_urls(),
        ]

    def test_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Reads, which change nothing there; the page says step by step what came of them."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        tested = testing.test(connection)
        self.remember(connection, "test", good=tested.good, account=tested.account)
        context = {
            **self.admin_site.each_context(request),
            "title": f"Test of {connection}",
            "opts": self.opts,
            "connection": connection,
            "tested": tested,
        }
        return TemplateResponse(request, "connectors/connection_test.html", context)

    def _test(self, connection: Connection) -> tuple[int, str]:
        tested = testing.test(connection)
        return tested.level, tested.text

    def check_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """A dry run: reads there, and shows what a push or a pull would come to."""
        if not checking.may_check(request.user) or not self.has_view_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if connection.calls_us or connection.provider not in PROVIDERS:
            self.message_user(request, f"The hub does not call {connection}: there is nothing to compare.")
            return self.back(connection)
        result = checking.checked(connection)
        context = {
            **self.admin_site.each_context(request),
            "title": f"{connection} compared with the hub",
            "opts": self.opts,
            "connection": connection,
            "checked": result,
            "rows": checking.rows(result.found, clear=sees(request.user)),
            "refusals": checking.refusals(result.found, clear=sees(request.user)),
            "can_view_customers": request.user.has_perm("customers.view_customer"),
            "push_address": reverse("admin:connectors_connection_push", args=[connection.pk])
            if connection.pushes and self.has_push_permission(request)
            else "",
        }
        return TemplateResponse(request, "connectors/check.html", context)

    def pull_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if not self.has_pull_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if not connection.pulls or connection.state != Connection.State.ACTIVE:
            why = f"{connection.get_direction_display()}. {connection.get_state_display()}."
            text = f"{connection} is not pulled. {why}"
            self.message_user(request, text, messages.ERROR)
            return self.back(connection)
        provider = PROVIDERS[connection.provider]
        try:
            session = provider.session(connection)
            session.deadline = testing.TEST_SECONDS
            run = pull(
                connection=connection,
                provider=provider,
                session=session,
                actor=actor_of(request),
                limit=PULL_ROWS,
            )
        except AlreadyRunning as error:
            self.message_user(request, str(error), messages.WARNING)
        except UnsealError as error:
            self.message_user(request, f"The credentials cannot be read. {error}", messages.ERROR)
        except ConnectorError as error:
            self.message_user(request, f"The pull ended early: {error.message}", messages.ERROR)
        else:
            more = ""
            if run.total >= PULL_ROWS:
                more = f" A press reads the first {PULL_ROWS}; schedule pulls to read all."
            text = f"Read {run.total} records: {run.created} created, {run.updated} updated.{more}"
            self.message_user(request, text, messages.SUCCESS)
        return self.back(connection)

    def push_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """First shows what pushing everything comes down to; the second POST asks for it, and the worker does it."""
        if not self.has_push_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if not connection.pushes:
            self.message_user(request, f"The hub does not send to {connection}.", messages.ERROR)
            return self.back(connection)
        typed = request.POST.get("typed_name", "").strip() == connection.name
        held = connection.opened_at is None and not typed and not canary_succeeded(connection)
        if request.POST.get("confirmed") and held:
            self.message_user(request, "Nothing is sent: the first customers have not gone out yet.", messages.ERROR)
        if held or not request.POST.get("confirmed"):
            customers = Customer.objects.filter(
                organization=connection.organization, archived_at=None, merged_into=None
            ).count()
            linked = CustomerLink.objects.filter(
                connection=connection,
                is_duplicate=False,
                customer__archived_at=None,
                customer__merged_into=None,
            ).count()
            context = {
                **self.admin_site.each_context(request),
                "title": f"Push all customers to {connection}",
                "opts": self.opts,
                "connection": connection,
                "held": held,
                "customers": customers,
                "new": max(customers - linked, 0),
                "counts": summary(counts_by_status([connection], now=timezone.now())[connection.pk]),
            }
            return TemplateResponse(request, "connectors/push_all.html", context)
        self.open_now(connection)
        run = request_push(connection=connection, actor=actor_of(request))
        text = f"{connection}: {run.planned} customers, {run.unchanged} already up to date. A worker sends the others."
        self.message_user(request, text, messages.SUCCESS)
        if request.user.has_perm("connectors.view_syncrun"):
            return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[run.pk]))
        return self.back(connection)

    def pause_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        reason = " ".join(request.POST.get("reason", "").replace("\x00", "").split())
        if not reason:
            if not self.has_change_permission(request):
                raise PermissionDenied
            connection = self.get_object(request, object_id)
            self.message_user(request, "Say why: the reason is shown to everybody who waits.", messages.ERROR)
            return self.back(connection)
        until = None
        if text := request.POST.get("until", ""):
            until = _moment(text)
            if until is None or until <= timezone.now():
                self.message_user(request, "The end of a pause is a time to come, or empty.", messages.ERROR)
                return self._unchanged(request, object_id)
        by = actor_of(request).name
        return self._set_state(request, object_id, Connection.State.PAUSED, f"{reason} ({by})", until=until)

    def _unchanged(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        return self.back(self.get_object(request, object_id))

    def resume_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if self.has_change_permission(request):
            connection = self.get_object(request, object_id)
            # Found while it was paused: the login that it has now leads to another account's customers.
            wrong = Issue.objects.filter(connection=connection, kind=Issue.Kind.WRONG_ACCOUNT, resolved_at=None).first()
            if connection.state == Connection.State.PAUSED and wrong is not None:
                connection.state, connection.state_reason = Connection.State.NEEDS_REAUTH, wrong.message
                connection.paused_until = None
                connection.save(update_fields=["state", "state_reason", "paused_until", "updated_at"])
            if connection.state == Connection.State.NEEDS_REAUTH:
                self._told(request, self._test(connection))
                return self.back(connection)
        return self._set_state(request, object_id, Connection.State.ACTIVE, "")

    def _set_state(
        self, request: HttpRequest, object_id: str, state: str, reason: str, *, until: datetime | None = None
    ) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        connection.state, connection.state_reason = state, reason[:500]
        connection.paused_until = until
        connection.save(update_fields=["state", "state_reason", "paused_until", "updated_at"])
        ends = f" until {until:%Y-%m-%d %H:%M} UTC" if until else ""
        self.message_user(request, f"{connection} is {connection.get_state_display().lower()}{ends}.", messages.SUCCESS)
        return self.back(connection)


def _moment(text: str) -> datetime | None:
    """The time that a form's input names, which is in UTC; None for no time."""
    try:
        found = parse_datetime(text.strip())
        return (found.replace(tzinfo=UTC) if timezone.is_naive(found) else found.astimezone(UTC)) if found else None
    except (ValueError, OverflowError):
        return None

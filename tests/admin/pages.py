"""Every address of the admin and who may use it: the one list that the tests of rights, side effects and looks go by.

A new page is one row in `PAGES`, a new action one row in `ACTIONS`; a page or an action without one fails the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.contrib import admin
from django.urls import NoReverseMatch, URLPattern, URLResolver, reverse

from tests.admin.world import World

# Who may: rights joined by "&" are needed together, "|" separates what suffices. These four are no rights.
EVERYBODY, STAFF, SUPERUSERS, NOBODY = "everybody", "staff", "superusers", "nobody"


@dataclass(frozen=True, kw_only=True)
class Page:
    """Who may read an address and who may post to it.

    `get=None`: the address answers 405 to everything but POST. `post=None`: the page has no form of its own, and what
    posting to it answers is not looked at. `of` names the object in `World.objects` that the address is about.
    """

    get: str | None = None
    post: str | None = None
    of: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    # What the address answers to those who may read it, where that is not 200.
    status: int = 200
    # What it answers to those who may not.
    refused: int = 403
    # The object is told by its id alone: everybody who may use the page may use it for any object.
    shared: bool = False
    # Whether this is a page of its own to look at, with what follows the "?" of an interesting view of it.
    look: bool = False
    query: str = ""
    arguments: tuple[Any, ...] = ()


def allowed(need: str, *, rights: frozenset[str], superuser: bool = False) -> bool:
    """Whether staff with these rights may."""
    if need == NOBODY:
        return False
    if superuser or need in (STAFF, EVERYBODY):
        return True
    if need == SUPERUSERS:
        return False
    return any({right.strip() for right in way.split("&")} <= rights for way in need.split("|"))


def _model(
    app: str,
    name: str,
    *,
    see: str = "",
    add: str = NOBODY,
    change: str = NOBODY,
    delete: str = NOBODY,
    delete_of: str = "",
    history: int = 200,
    shared: bool = False,
) -> dict[str, Page]:
    """The addresses that Django makes for a model. `see` follows from the rights to view and change it."""
    see = see or (f"{app}.view_{name}" if change == NOBODY else f"{app}.view_{name} | {change}")
    key = f"{app}_{name}"
    return {
        f"{key}_changelist": Page(get=see, look=True),
        f"{key}_add": Page(get=add, post=add, look=add != NOBODY),
        f"{key}_change": Page(get=see, post=change, of=name, look=True, shared=shared),
        f"{key}_history": Page(get=see, of=name, status=history, shared=shared),
        f"{key}_delete": Page(get=delete, post=delete, of=delete_of or name, shared=shared, look=delete != NOBODY),
        f"{app}/{name}/<path:object_id>/": Page(get=STAFF, of=name, status=302, shared=True),
    }


SEE_CUSTOMERS = "customers.view_customer | customers.change_customer"
SEE_CONNECTIONS = "connectors.view_connection | connectors.change_connection"
PUSH = "connectors.push_customerlink"
SEE_LINKS, SEE_RUNS = "connectors.view_customerlink", "connectors.view_syncrun"
NO_FILE = UUID(int=0)


def _both(need: str, seeing: str) -> str:
    return " | ".join(f"{need} & {way.strip()}" for way in seeing.split("|"))


COMPARE = _both(PUSH, SEE_CUSTOMERS) + " | " + _both("connectors.view_customerlink", SEE_CUSTOMERS)
NOTE = _both("customers.add_note", SEE_CUSTOMERS)
ANY_OF_AUTH = " | ".join(
    f"auth.{verb}_{name}" for verb in ("view", "add", "change", "delete") for name in ("user", "group")
)

PAGES: dict[str, Page] = {
    "index": Page(get=STAFF, look=True),
    "login": Page(get=EVERYBODY, post=EVERYBODY, status=302, look=True),
    "logout": Page(post=STAFF),
    "password_change": Page(get=STAFF, post=STAFF, look=True),
    "password_change_done": Page(get=STAFF),
    "autocomplete": Page(get=NOBODY),
    "jsi18n": Page(get=STAFF),
    "search": Page(get=STAFF),
    "view_on_site": Page(get=STAFF, status=404, arguments=("1", "1")),
    "app_list": Page(get=ANY_OF_AUTH, arguments=("auth",), refused=404, look=True),
    # Customers
    **_model("customers", "customer", add="customers.add_customer", change="customers.change_customer", history=302),
    "customers_customer_push": Page(post=_both(PUSH, SEE_CUSTOMERS), of="customer"),
    "customers_customer_archive": Page(post="customers.change_customer", of="customer"),
    "customers_customer_restore": Page(post="customers.change_customer", of="archived"),
    "customers_customer_note": Page(post=NOTE, of="customer", data={"text": "Called back."}),
    "customers_customer_reveal": Page(post=_both("customers.reveal_personal_data", SEE_CUSTOMERS), of="customer"),
    "customers_customer_preview": Page(get=COMPARE, of="customer", look=True),
    "customers_customer_read": Page(post=_both(PUSH, SEE_CUSTOMERS), of="customer"),
    "customers_customer_link": Page(get=_both(PUSH, SEE_CUSTOMERS), of="customer", look=True),
    "customers_customer_link_read": Page(post=_both(PUSH, SEE_CUSTOMERS), of="customer"),
    "customers_customer_link_save": Page(post=_both(PUSH, SEE_CUSTOMERS), of="customer", data={"side": "here"}),
    "customers_customer_import": Page(get="customers.import_customer", post="customers.import_customer", look=True),
    # Everybody's own files alone: somebody else's, and one that is gone, are not found.
    "customers_customer_import_confirm": Page(get="customers.import_customer", arguments=(NO_FILE,), status=404),
    "customers_customer_export": Page(get=_both("customers.export_customer", SEE_CUSTOMERS), arguments=("csv",)),
    **_model("customers", "customerchange"),
    **_model("customers", "reveal"),
    # Connections
    **_model(
        "connectors",
        "connection",
        add="connectors.add_connection",
        change="connectors.change_connection",
        delete="connectors.delete_connection",
        delete_of="unused_connection",
    ),
    "connectors_connection_test": Page(post="connectors.change_connection", of="connection"),
    "connectors_connection_pull": Page(post=_both("connectors.pull_connection", SEE_CONNECTIONS), of="connection"),
    "connectors_connection_push": Page(post=_both(PUSH, SEE_CONNECTIONS), of="connection"),
    "connectors_connection_pause": Page(
        post="connectors.change_connection", of="connection", data={"reason": "Stocktaking"}
    ),
    "connectors_connection_resume": Page(post="connectors.change_connection", of="paused_connection"),
    "connectors_connection_first_steps": Page(get=SEE_CONNECTIONS, of="new_connection", look=True),
    "connectors_connection_direction": Page(
        post="connectors.change_connection", of="new_connection", data={"direction": "push"}
    ),
    "connectors_connection_match": Page(post="connectors.change_connection", of="new_connection"),
    "connectors_connection_canary": Page(post=_both(PUSH, SEE_CONNECTIONS), of="new_connection"),
    "connectors_connection_open": Page(post="connectors.change_connection", of="new_connection"),
    "connectors_connection_check": Page(
        post=_both(PUSH, SEE_CONNECTIONS) + " | " + _both("connectors.pull_connection", SEE_CONNECTIONS),
        of="connection",
    ),
    # Links, and what needs somebody
    **_model("connectors", "customerlink"),
    "connectors_customerlink_pause": Page(
        post=f"{PUSH} & {SEE_LINKS}", of="customerlink", data={"reason": "Stocktaking"}
    ),
    "connectors_customerlink_resume": Page(post=f"{PUSH} & {SEE_LINKS}", of="paused_link"),
    "connectors_customerlink_needs_you": Page(
        get=f"{SEE_LINKS} | connectors.change_connection | connectors.change_issue", look=True
    ),
    "connectors_customerlink_push_again": Page(
        post=f"{PUSH} & {SEE_LINKS}", data={"connection": "{connection}", "cause": ""}
    ),
    "connectors_customerlink_conflicts": Page(get=SEE_LINKS, post=f"{PUSH} & {SEE_LINKS}", look=True),
    "connectors_customerlink_resolve": Page(
        get=SEE_LINKS,
        post=f"{PUSH} & {SEE_LINKS}",
        of="uncertain_link",
        data={"decision": "keep_waiting"},
        look=True,
    ),
    **_model("connectors", "conflict"),
    **_model("connectors", "issue", see="connectors.view_issue | connectors.change_issue"),
    "connectors_issue_seen": Page(post="connectors.change_issue", of="issue"),
    # Runs
    **_model("connectors", "syncrun"),
    "connectors_syncrun_retry": Page(post=f"{PUSH} & {SEE_RUNS}", of="syncrun"),
    "connectors_syncrun_cancel": Page(post=f"{PUSH} & {SEE_RUNS}", of="running_run"),
    "connectors_syncrun_errors": Page(get=f"customers.export_customer & {SEE_RUNS}", of="syncrun"),
    # Keys and people
    **_model("connectors", "apikey", add="connectors.add_apikey", change="connectors.change_apikey"),
    "connectors_apikey_revoke": Page(post="connectors.change_apikey", of="apikey"),
    **_model("customers", "organization", see=SUPERUSERS, add=SUPERUSERS, change=SUPERUSERS, shared=True),
    **_model(
        "auth",
        "user",
        add="auth.add_user & auth.change_user",
        change="auth.change_user",
        delete="auth.delete_user",
    ),
    "auth_user_password_change": Page(get="auth.change_user", post="auth.change_user", of="user"),
    **_model(
        "auth",
        "group",
        add="auth.add_group",
        change="auth.change_group",
        delete="auth.delete_group",
        shared=True,
    ),
}

# Model and action: who may, and what the action's own page is posted beside the chosen rows.
ACTIONS: dict[tuple[str, str], Page] = {
    ("customer", "archive_selected"): Page(post="customers.change_customer", of="customer"),
    ("customer", "restore_selected"): Page(post="customers.change_customer", of="archived"),
    ("customer", "push_selected"): Page(post=_both(PUSH, SEE_CUSTOMERS), of="customer", data={"confirmed": "yes"}),
    ("customer", "check_selected"): Page(
        post=_both(PUSH, SEE_CUSTOMERS) + " | " + _both("connectors.pull_connection", SEE_CUSTOMERS), of="customer"
    ),
    ("issue", "see_to_selected"): Page(post="connectors.change_issue", of="issue"),
    ("apikey", "revoke_selected"): Page(post="connectors.change_apikey", of="apikey", data={"confirmed": "yes"}),
    ("user", "delete_selected"): Page(post="auth.delete_user", of="user", data={"post": "yes"}),
    ("group", "delete_selected"): Page(post="auth.delete_group", of="group", data={"post": "yes"}, shared=True),
}
# The rights to see that a list asks for before it offers its actions.
LISTS = {
    name: PAGES[f"{app}_{name}_changelist"].get
    for app, name in (
        ("customers", "customer"),
        ("connectors", "apikey"),
        ("connectors", "issue"),
        ("auth", "user"),
        ("auth", "group"),
    )
}


def addresses() -> set[str]:
    """The name of every address of the admin, from the resolver; where it has no name, its pattern."""
    return set(_walk(admin.site.urls[0], ""))


def _walk(patterns: list[URLPattern | URLResolver], before: str) -> Iterator[str]:
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from _walk(pattern.url_patterns, before + str(pattern.pattern))
        elif not pattern.name and str(pattern.pattern) == r"(?P<url>.*)$":
            continue  # what leads nowhere
        else:
            yield pattern.name or before + str(pattern.pattern)


def address(name: str, world: World, *, query: bool = False) -> str:
    """Where the page is, for this world's object."""
    page = PAGES[name]
    found = [world.objects[page.of].pk] if page.of else list(page.arguments)
    if "/" in name:
        path = f"/admin/{name.replace('<path:object_id>', str(found[0]))}"
    else:
        try:
            path = reverse(f"admin:{name}", args=found)
        except NoReverseMatch as error:
            raise AssertionError(f"{name}: name in PAGES what the address takes ({error})") from None
    return path + (f"?{page.query}" if query and page.query else "")


def data(page: Page, world: World) -> dict[str, Any]:
    """What is posted; a name of `World.objects` in braces stands for that object's id."""
    ids = {name: found.pk for name, found in world.objects.items()}
    return {name: str(value).format(**ids) for name, value in page.data.items()}


def actions() -> set[tuple[str, str]]:
    """Every action of every list, whoever may use it."""
    found = set()
    for model, options in admin.site._registry.items():
        offered = {function.__name__ if callable(function) else function for function in options.actions or ()}
        if _deletes(options):
            offered.add("delete_selected")
        found |= {(str(model._meta.model_name), name) for name in offered}
    return found


def _deletes(options: Any) -> bool:
    """Whether the list offers Django's own action, as it does where nothing says otherwise."""
    from django.contrib.auth.models import User
    from django.test import RequestFactory

    request = RequestFactory().get("/")
    request.user = User(is_superuser=True, is_active=True, is_staff=True)
    return "delete_selected" in options.get_actions(request)

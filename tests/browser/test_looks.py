"""Every own page, in light and dark, wide and on a phone: nothing bars anybody and nothing is cut off."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User

from customers.models import Organization
from tests.admin import pages, world
from tests.admin.pages import PAGES
from tests.browser.person import LIGHT, PHONE, PLAIN, WIDE, Person

pytestmark = pytest.mark.django_db(transaction=True)
LOOKED_AT = sorted(name for name, page in PAGES.items() if page.look and name in pages.addresses())
# Pages are visited in a few tests: making and clearing away the hub costs more than a visit.
PARTS = 4


@pytest.mark.parametrize("mode", [LIGHT], ids=str, indirect=True)
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_bars_anybody(part: int, visitor: Person, alex: User, organization: Organization) -> None:
    here = world.make(organization)
    found: list[str] = []
    for name in LOOKED_AT[part::PARTS]:
        if name == "login":
            visitor.driver.delete_all_cookies()
        else:
            visitor.logged_in(alex)
        visitor.open(pages.address(name, here, query=True))
        for size in (WIDE, PHONE):
            visitor.resize(size)
            found += [f"{name} {size[0]}: {told}" for told in [visitor.too_wide()] if told]
            for dark in (False, True):
                visitor.repaint(dark=dark)
                where = f"{name} {'dark' if dark else 'light'} {size[0]}"
                # The dark page is the same page: only its colours are others.
                found += [f"{where}: {barrier}" for barrier in visitor.barriers(colours_alone=dark)]
        found += [f"{name}: {told}" for told in visitor.wrongly_built()]
        visitor.resize(WIDE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mode", [PLAIN], ids=str, indirect=True)
def test_every_page_shows_without_scripts(visitor: Person, alex: User, organization: Organization) -> None:
    """Axe itself is a script and cannot look here: what is looked at is that the page is there and fits."""
    here = world.make(organization)
    visitor.logged_in(alex)
    found: list[str] = []
    for name in LOOKED_AT:
        if name == "login":
            continue
        visitor.open(pages.address(name, here, query=True))
        found += [f"{name}: {told}" for told in visitor.wrongly_built()]
        visitor.resize(PHONE)
        found += [f"{name}: {told}" for told in [visitor.too_wide()] if told]
        visitor.resize(WIDE)
    assert not found, "\n".join(found)

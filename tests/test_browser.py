"""A person at a real browser: logs in, finds a customer, edits it, pushes it, and sees what came of it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from connectors.guard import close_shared_client
from connectors.models import ApiKey, Connection
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not CHROMIUM or not DRIVER, reason="needs chromium and chromedriver (apt install chromium-driver)"
    ),
    pytest.mark.django_db(transaction=True),
]


@pytest.fixture(params=[True, False], ids=["with scripts", "without scripts"])
def browser(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1400,1400",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    if not request.param:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
        close_shared_client()


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    return WebDriverWait(browser, 20).until(lambda b: b.find_element(By.CSS_SELECTOR, selector))


def click(browser: webdriver.Chrome, selector: str) -> None:
    """Press what a person sees, and wait until the page it leads to is there."""
    before = find(browser, "html").id
    element = find(browser, selector)
    assert element.is_displayed()
    element.click()
    WebDriverWait(browser, 20).until(lambda b: b.find_element(By.CSS_SELECTOR, "html").id != before)


def fill(browser: webdriver.Chrome, selector: str, text: str) -> None:
    element = find(browser, selector)
    element.clear()
    element.send_keys(text)


def body(browser: webdriver.Chrome) -> str:
    return find(browser, "body").text


def test_find_edit_push_and_see_the_result(
    browser: webdriver.Chrome,
    live_server: Any,
    settings: Any,
    organization: Organization,
    other_organization: Organization,
    connect: Callable[..., Connection],
) -> None:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    User.objects.create_superuser("alex", password="secret")
    key = ApiKey.issue(organization=other_organization, name="demo")[1]
    connect(
        "links",
        name="Partner",
        direction=Connection.Direction.PUSH,
        base_url=f"{live_server.url}/api/v1",
        credentials={"api_key": key},
    )
    [customer] = editing.create(
        organization=organization,
        values=[{"name": "Acme Corporation", "email": ""}],
        actor=Actor(kind="command", name="test"),
    )

    browser.get(f"{live_server.url}/admin/")
    fill(browser, "#id_username", "alex")
    fill(browser, "#id_password", "secret")
    click(browser, "button[type=submit]")

    browser.get(f"{live_server.url}/admin/customers/customer/")
    fill(browser, "#searchbar", "acme")
    find(browser, "#searchbar").submit()
    WebDriverWait(browser, 20).until(lambda b: "q=acme" in b.current_url)
    click(browser, "#result_list tbody th a")
    assert "Not linked" in body(browser)

    click(browser, "#systems button[aria-label='Push to Partner']")
    assert "Rejected in Partner" in body(browser)
    assert "Links needs an e-mail address" in body(browser)

    fill(browser, "#id_email", "contact@acme.com")
    fill(browser, "#id_message", "as told by phone")
    click(browser, "button[name=_push]")
    page = body(browser)
    assert "Sent. Partner accepted version 2" in page
    assert "In sync" in page
    assert "as told by phone" in page
    arrived = Customer.objects.get(organization=other_organization)
    assert (arrived.name, arrived.email) == ("Acme Corporation", "contact@acme.com")

    click(browser, "#systems button[aria-label='Push to Partner']")
    assert "Already up to date, nothing was sent to Partner." in body(browser)

    assert customer.links.get().remote_id == arrived.public_id
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry["message"] for entry in errors if "favicon" not in entry["message"]] == []

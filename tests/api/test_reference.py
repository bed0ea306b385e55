"""The pages about the API: complete, open to everybody, and without anything from elsewhere."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from connectors.api import reference
from connectors.api.problems import CODES, PAGE, body
from connectors.guard import close_shared_client

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TAGS = ("Links", "Commenda", "Cheqpay", "RootFi", "Customer Hub")


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_the_page_that_its_problems_name(code: str, api: Client) -> None:
    named = body(code, "…", request_id="req_1")["type"]
    for address in (named, f"{named}/"):
        answer = api.get(address)
        assert answer.status_code == 200
        page = answer.content.decode()
        assert f"<code>{code}</code>" in page
        assert str(CODES[code].status) in page
        assert "'self'" in answer["Content-Security-Policy"]


@pytest.mark.parametrize("name", ["validation_failed", "no-such-code", "Validation-failed"])
def test_other_addresses_have_no_page(name: str, api: Client) -> None:
    assert api.get(f"{PAGE}{name}").status_code == 404


def test_the_list_of_codes_names_all_and_what_to_do(api: Client) -> None:
    page = api.get("/api/docs/errors/").content.decode()
    assert all(f'href="{PAGE}{code.replace("_", "-")}"' in page.replace('/"', '"') for code in CODES)
    assert "What to do when" in page
    assert page.count("Retry-After") >= 2


def test_the_document_is_served_once_made_and_cacheable(api: Client) -> None:
    answer = api.get("/api/schema/")
    assert answer["Content-Type"] == "application/json"
    assert "max-age" in answer["Cache-Control"]
    made = json.loads(answer.content)
    assert made["openapi"].startswith("3.1.")
    assert api.get("/api/schema", headers={"If-None-Match": answer["ETag"]}).status_code == 304
    assert reference.document() is reference.document()
    assert api.post("/api/schema/").status_code == 405


def test_tools_find_everything_in_llms_txt(api: Client) -> None:
    text = api.get("/llms.txt").content.decode()
    assert all(f"\n## {tag}\n" in text for tag in TAGS)
    addresses = re.findall(r"\(http://testserver(/[^)]*)\)", text)
    assert len(addresses) >= 3
    assert all(api.get(address).status_code == 200 for address in addresses)
    assert "x-merchant-id" in text
    for path in json.loads(reference.document())["paths"]:
        assert path in text


@pytest.mark.django_db  # the end of an answer looks after the connection
def test_the_pages_need_nothing_from_elsewhere(api: Client) -> None:
    for address in ("/api/docs/", "/api/docs/errors/", "/api/docs/errors/not-found/"):
        page = api.get(address).content.decode()
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert loaded
        assert all(one.startswith(("/", "data:,")) and not one.startswith("//") for one in loaded)
        for one in {*loaded} - {"data:,"}:
            answer = api.get(one)
            assert answer.status_code == 200, one
            answer.close()  # a file stays open until it has been sent


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A browser that reaches this machine and nothing else."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1400,1400",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
        close_shared_client()


@pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromedriver (apt install chromium-driver)")
def test_the_reference_shows_the_operations_of_every_surface_without_a_network(
    offline: webdriver.Chrome, server: str
) -> None:
    made = json.loads(reference.document())
    wanted = sum(len(methods) for methods in made["paths"].values())
    offline.get(f"{server}/api/docs/")
    WebDriverWait(offline, 60).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".opblock")) >= wanted)
    sections = {
        section.find_element(By.CSS_SELECTOR, "[data-tag]").get_attribute("data-tag"): len(
            section.find_elements(By.CSS_SELECTOR, ".opblock")
        )
        for section in offline.find_elements(By.CSS_SELECTOR, ".opblock-tag-section")
    }
    assert set(sections) == set(TAGS)
    assert all(sections.values())
    # An operation opens and shows what a caller sends.
    offline.find_element(By.CSS_SELECTOR, "[id$='createUnifiedCustomer'] button").click()
    WebDriverWait(offline, 20).until(
        lambda b: "Acme Corp" in b.find_element(By.CSS_SELECTOR, "[id$='createUnifiedCustomer']").text
    )
    asked = [
        message["params"]["request"]["url"]
        for entry in offline.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in asked if not url.startswith((server, "data:", "chrome:"))} == set()
    severe: list[Any] = [entry for entry in offline.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []

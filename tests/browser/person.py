"""A person at a real browser: finds things by the words on the screen, and goes on when the next page is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from axe_core_python.base import AXE_SCRIPT
from django.contrib.auth.models import User
from django.test import Client
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver (apt install chromium-driver)"
WAIT = 20
WIDE, PHONE = (1280, 1000), (360, 740)
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@dataclass(frozen=True)
class Mode:
    """How the person looks at it."""

    name: str
    dark: bool = False
    size: tuple[int, int] = WIDE
    scripts: bool = True

    def __str__(self) -> str:
        return self.name


LIGHT = Mode("light")
DARK_PHONE = Mode("dark on a phone", dark=True, size=PHONE)
PLAIN = Mode("without scripts", scripts=False)
MODES = (LIGHT, DARK_PHONE, PLAIN)


@cache
def browser(*, scripts: bool) -> webdriver.Chrome:
    """One browser for all tests of this process, and one that runs no scripts. `quit_all` ends them."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tempfile.TemporaryDirectory(prefix="hub-browser-")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion", f"--user-data-dir={profile.name}",
    ):  # fmt: skip
        options.add_argument(argument)
    if not scripts:
        # The emulated switch of the developer tools leaves <noscript> out; this one is what a person would set.
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    _started.append((driver, profile))
    return driver


_started: list[tuple[webdriver.Chrome, tempfile.TemporaryDirectory[str]]] = []


def quit_all() -> None:
    for driver, profile in _started:
        driver.quit()
        profile.cleanup()
    _started.clear()
    browser.cache_clear()


class Person:
    """Somebody at the screen. Every page is checked on arrival: no error in the console, nothing wider than a phone."""

    def __init__(self, driver: webdriver.Chrome, *, mode: Mode, url: str) -> None:
        self.driver, self.mode, self.url = driver, mode, url
        self.resize(mode.size)
        self.colours(dark=mode.dark)

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, *, dark: bool) -> None:
        wanted = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wanted]})

    def logged_in(self, user: User) -> Person:
        """Come back with the session of this person."""
        client = Client()
        client.force_login(user)
        self.driver.get(f"{self.url}/livez")
        self.driver.delete_all_cookies()
        self.driver.add_cookie({"name": "sessionid", "value": client.cookies["sessionid"].value, "path": "/"})
        return self

    # Going

    def open(self, path: str) -> Person:
        self.driver.get(self.url + path)
        return self._arrived()

    def press(self, words: str, *, within: str = "") -> Person:
        """Click the button or link that is called so, and wait for the page it leads to."""
        return self._go(lambda: self.named(words, within).click())

    def click(self, selector: str) -> Person:
        return self._go(lambda: self.to(self.find(selector)).click())

    def submit(self, selector: str) -> Person:
        """Enter, in this field."""
        return self._go(lambda: self.find(selector).submit())

    def to(self, element: WebElement) -> WebElement:
        """Scroll to it: the driver itself presses what lies under a bar at the edge of the screen."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def _go(self, act: Callable[[], None]) -> Person:
        before = self._page()
        act()
        self.wait(lambda: self._page() not in (before, ""))
        return self._arrived()

    def _page(self) -> str:
        """Tells one page from the next; nothing while the browser is between two."""
        try:
            return str(self.driver.find_element(By.TAG_NAME, "html").id)
        except WebDriverException:
            return ""

    def _arrived(self) -> Person:
        self.wait(lambda: self.driver.execute_script("return document.readyState") == "complete")
        if self.mode.size[0] <= PHONE[0]:
            self.fits()
        if self.mode.scripts:
            self.is_quiet()
        return self

    # Looking

    def wait(self, there: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, WAIT, poll_frequency=0.05).until(lambda _: there())

    def find(self, selector: str) -> WebElement:
        """The first such thing that can be seen."""

        def seen() -> WebElement | None:
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed()), None)

        element: WebElement = self.wait(seen)
        return element

    def named(self, words: str, within: str = "") -> WebElement:
        """The button or link that is called so, scrolled to."""
        text = f"normalize-space(.)={_quoted(words)} or @aria-label={_quoted(words)} or @value={_quoted(words)}"
        path = " | ".join(f".//{tag}[{text}]" for tag in ("button", "a", "summary", "input[@type='submit']"))

        def seen() -> WebElement | None:
            place = self.driver.find_element(By.CSS_SELECTOR, within or "body")
            return next((element for element in place.find_elements(By.XPATH, path) if element.is_displayed()), None)

        try:
            element: WebElement = self.wait(seen)
        except Exception:
            raise AssertionError(f"There is no button or link {words!r} to be seen.\n{self.text()}") from None
        return self.to(element)

    def offers(self, words: str) -> bool:
        path = f"//*[self::button or self::a][normalize-space(.)={_quoted(words)} or @aria-label={_quoted(words)}]"
        return any(element.is_displayed() for element in self.driver.find_elements(By.XPATH, path))

    def text(self) -> str:
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def reads(self, *texts: str) -> Person:
        shown = self.text()
        for text in texts:
            assert text in shown, f"{text!r} is not on the page {self.driver.current_url}:\n{shown}"
        return self

    # Filling in

    def fill(self, selector: str, text: str) -> Person:
        element = self.find(selector)
        element.clear()
        element.send_keys(text)
        return self

    def write(self, label: str, text: str) -> Person:
        """Fill in the field that is labelled so."""
        return self.fill(f"#{self._labelled(label)}", text)

    def choose(self, selector: str, text: str) -> Person:
        Select(self.find(selector)).select_by_visible_text(text)
        return self

    def tick(self, selector: str) -> Person:
        """Tick the box, or choose the radio button; what is covered by a drawn switch is pressed at its label."""
        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        if not element.is_selected():
            self.to(element).click()
        assert element.is_selected()
        return self

    def _labelled(self, label: str) -> str:
        path = f"//label[starts-with(normalize-space(.), {_quoted(label)})][@for]"
        for found in self.driver.find_elements(By.XPATH, path):
            if found.is_displayed():
                return str(found.get_attribute("for"))
        raise AssertionError(f"No field is labelled {label!r}.\n{self.text()}")

    # Judging

    def repaint(self, *, dark: bool) -> None:
        """What the theme does to a page where the system is switched over, without loading it again."""
        self.colours(dark=dark)
        self.driver.execute_script(REPAINT, dark)

    def fits(self) -> None:
        assert not (told := self.too_wide()), f"{self.driver.current_url} {told}"

    def too_wide(self) -> str:
        """What makes the whole page scroll sideways, if anything does."""
        width, limit, broad = self.driver.execute_script(FITS)
        return f"is {width} px wide at {limit}: {broad}" if width > limit else ""

    def wrongly_built(self) -> list[str]:
        """What every page has to have, with scripts or without."""
        shown = [element for element in self.driver.find_elements(By.TAG_NAME, "h1") if element.is_displayed()]
        found = [] if len(shown) == 1 else [f"{len(shown)} main headings: {[element.text for element in shown]}"]
        found += [f"no scope: {text}" for text in self.driver.execute_script(SCOPELESS)]
        return found

    def is_quiet(self) -> None:
        """The console shows no error."""
        severe = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        told = [message for message in severe if "favicon" not in message]
        assert not told, f"{self.driver.current_url}: {told}"

    def judged(self) -> Person:
        """For pages that only a press leads to: what the list of pages cannot visit is judged on the way."""
        if self.mode.scripts:
            assert not (found := self.barriers()), "\n".join(found)
        assert not (wrong := self.wrongly_built()), wrong
        return self

    def barriers(self, *, colours_alone: bool = False) -> list[str]:
        """What axe finds serious or critical on this page, one line each."""
        if not self.driver.execute_script("return 'axe' in window"):
            self.driver.execute_script(AXE_SCRIPT)
        found: list[dict[str, Any]] = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {runOnly: arguments[0], resultTypes: ['violations']}).then("
            "found => done(found.violations), error => done([{id: String(error), impact: 'critical', nodes: []}]))",
            ["color-contrast", "link-in-text-block"] if colours_alone else WCAG,
        )
        return [
            f"{rule['id']} ({rule['impact']}): {node['target'][0]} {node.get('any') and node['any'][0]['message']}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"] or [{"target": ["the page"]}]
        ]


FITS = """
const root = document.documentElement;
const wide = root.scrollWidth, limit = window.innerWidth;
const broad = wide <= limit ? [] : [...document.body.querySelectorAll('*')]
  .filter(e => e.getBoundingClientRect().right > limit + 1 )
  .slice(0, 5).map(e => e.tagName + '.' + e.className + ' ' + (e.id || '') + ' ' + e.innerText?.slice(0, 40));
return [wide, limit, broad];
"""

REPAINT = """
document.documentElement.classList.toggle('dark', arguments[0]);
if (!document.getElementById('still')) {
  const still = document.createElement('style');
  still.id = 'still';
  still.textContent = '* { transition: none !important; animation: none !important; }';
  document.head.append(still);
}
"""
SCOPELESS = "return [...document.querySelectorAll('.hub th:not([scope])')].map(th => th.innerText)"


def _quoted(text: str) -> str:
    """As XPath writes a text; none of ours has both kinds of quotes."""
    return f'"{text}"' if "'" in text else f"'{text}'"

"""Pictures of the admin, from a quickstart that is running: `python tests/screenshots/make.py URL PASSWORD`."""

import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

FOLDER = Path(__file__).parent


def main(url: str, password: str) -> None:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1280, 1000)
        browser.get(f"{url}/admin/")
        browser.find_element(By.ID, "id_username").send_keys("admin")
        browser.find_element(By.ID, "id_password").send_keys(password)
        browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        time.sleep(1)
        browser.get(f"{url}/admin/customers/customer/?q=florist03%40example.com&organization=1")
        browser.find_element(By.CSS_SELECTOR, "#result_list tbody th a").click()
        time.sleep(1)
        browser.save_screenshot(str(FOLDER / "customer.png"))
    finally:
        browser.quit()


if __name__ == "__main__":
    main(*sys.argv[1:3])

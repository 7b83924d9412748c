"""Somebody at the page of the app: a Space served without this package, and headless Chromium before it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"),
)
# Runs the script of a Space where this package cannot be imported.
WITHOUT_PACKAGE = """
import runpy, sys

sys.modules["bd3lm_hf"] = None
sys.path.insert(0, ".")
runpy.run_path("app.py", run_name="__main__")
"""
# Seconds; a machine that is busy is slow.
PATIENCE = 180


@contextlib.contextmanager
def served(space: Path) -> Iterator[str]:
    """The address at which the app of a Space answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as home:
        server = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_PACKAGE],
            cwd=space,
            env={**environment, "HF_HOME": home},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + PATIENCE
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"The app does not answer:\n{log.read()}")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/config", timeout=PATIENCE).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser that has never been used, and keeps a record of what it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # A process of the browser may write there for a moment after it has quit.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class Visitor:
    """What somebody does at the page, and what is to be seen there."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.until(lambda: self.all("#prompt textarea"))

    def until(self, condition):
        return WebDriverWait(self.browser, PATIENCE, poll_frequency=0.1).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name):
        return self.browser.execute_script(f"return document.querySelector('#{name}').textContent").strip()

    def type(self, name, text):
        # The number of a slider stands before its handle.
        field = self.all(f"#{name} input, #{name} textarea")[0]
        field.clear()
        field.send_keys(text)

    def choose(self, sampler):
        self.browser.find_element(By.CSS_SELECTOR, f"#sampler input[value='{sampler}']").click()

    def open_tab(self, name):
        tabs = self.browser.find_elements(By.XPATH, f"//button[@role='tab'][contains(., '{name}')]")
        next(tab for tab in tabs if tab.is_displayed()).click()

    def press(self, name):
        self.all(f"#{name}")[0].click()

    def finish(self):
        """Waits for the perplexity, which comes last; returns the figures by name."""
        self.until(lambda: "nats per token" in self.text("figures"))
        cards = self.all("#figures .bd3lm-figures > div")
        return dict(reversed(card.text.split("\n")) for card in cards)

    def error(self):
        self.until(lambda: self.all("#text [role=alert]"))
        return self.text("text")

"""The page in a real browser: no error, no outside request, every picture visible."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_privacy.report import write_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VISIBLE = """
const strict = {opacityProperty: true, visibilityProperty: true};
return [...document.images].map(image => {
  const box = image.getBoundingClientRect();
  return [image.naturalWidth, box.width, box.height, image.checkVisibility(strict)];
});
"""
WIDTHS = """
return [document.documentElement.scrollWidth, document.documentElement.clientWidth];
"""
BACKGROUND = "return getComputedStyle(document.body).backgroundColor;"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()),
        reason="needs the packages chromium and chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(synthetic_run: Callable[..., Any]) -> str:
    def near(i: int, target: Any) -> Tensor | str:
        if i == 1:
            return "the loss was not finite; " + "averylongword" * 12
        noise = torch.randn(target.truth.inputs.shape, generator=torch.Generator().manual_seed(i))
        inputs: Tensor = target.truth.inputs + 0.1 * noise
        return inputs

    run = synthetic_run(node="1234567890123456789{}", lost="MemoryError")
    run.add_results("gradient_similarity", near, adversary="gradient_similarity(tv=0.05)")
    run.add_results("analytic", near, oracle=("labels",))
    run.add_results("baseline", lambda i, target: torch.full_like(target.truth.inputs, 0.4))
    return write_report(run.path).as_uri()


def show(browser: Any, page: str, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    browser.get(page)


def requested(browser: Any) -> list[str]:
    """Every address the browser asked for since the last call."""
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [p["request"]["url"] for p in sent]


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_in_chromium(browser: Any, page: str, width: int) -> None:
    requested(browser)
    show(browser, page, width)
    addresses = requested(browser)
    assert page in addresses
    assert all(a == page or a.startswith("data:") for a in addresses)
    assert browser.get_log("browser") == []

    pictures = browser.execute_script(VISIBLE)
    assert len(pictures) == 8 * 4 - 2
    for natural, wide, high, visible in pictures:
        assert natural == 8
        assert visible
        assert wide >= 48
        assert high == pytest.approx(wide, abs=1)

    content, window = browser.execute_script(WIDTHS)
    assert content <= window <= width


def test_light_and_dark_follow_the_reader(browser: Any, page: str) -> None:
    seen = []
    for scheme in ("light", "dark"):
        show(browser, page, 1280, scheme)
        seen.append(browser.execute_script(BACKGROUND))
    assert seen[0] != seen[1]

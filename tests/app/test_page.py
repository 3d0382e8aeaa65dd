"""The page in a real browser: every panel drawn, nothing fetched, no error, on a phone and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import rig
from runs import made_up_run

from controlprune.app.cli import main
from controlprune.app.page import Assumed, page, write_page
from controlprune.loop.history import History

PANELS = ["map-run", "resources", "price", "loss", "switches", "widths"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; where there is none the tests of the page's text remain."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


def shown(browser: Any, path: Path, width: int = 1100, scheme: str = "light") -> None:
    """The page, drawn whole; errors of the console and requests to a network fail."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    WebDriverWait(browser, 120).until(lambda b: b.execute_script("return document.body.dataset.drawn"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def run_with_refusals() -> History:
    history = made_up_run()
    history.refused = (("head <out>", 10, "an output of the model"),)
    return history


def test_every_panel_is_drawn_on_a_desk_a_phone_and_in_the_dark(browser: Any, tmp_path: Path) -> None:
    path = write_page({"run": run_with_refusals()}, tmp_path / "report.html", Assumed(watts=65))
    for width, scheme in ((1100, "light"), (390, "dark")):
        shown(browser, path, width, scheme)
        for panel in PANELS:
            box = browser.execute_script(
                "const b = document.querySelector(`#${arguments[0]} .main-svg`).getBoundingClientRect();"
                "return [b.width, b.height]", panel,
            )  # fmt: skip
            assert 200 < box[0] <= width, panel
            assert box[1] > 150, panel
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width + 1
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
        ink = browser.execute_script("return document.getElementById('loss').layout.font.color")
        assert ink == ("#1c1e21" if scheme == "light" else "#e6e7e9")
    assert "head <out>" in browser.find_element("id", "refused").text


def test_runs_over_each_other(browser: Any, tmp_path: Path) -> None:
    names = []
    for name, budget in (("deep", 0.3), ("mild", 0.7)):
        names.append(made_up_run(budget=budget).write(tmp_path / name / "history.jsonl"))
    out = tmp_path / "both.html"
    assert main(["report", "--compare", *map(str, names), "-o", str(out)]) == 0
    shown(browser, out)
    traces = browser.execute_script("return document.getElementById('loss').data.map(t => t.name)")
    assert traces == ["deep/history", "mild/history"]


def test_a_page_says_what_the_record_says(tmp_path: Path) -> None:
    run = rig(total_steps=30)
    run.train(0, 30)
    run.controller.finalize()
    file = run.controller.history.write(tmp_path / "history.jsonl")
    again = History.read(file)
    assert again.refused == run.controller.history.refused != ()
    text = page({"run": again}, Assumed())
    last = again[-1]
    assert f"flops {100 * last.realised['flops']:.1f} % (budget 50 %)" in text
    assert again.refused[0][2] in text
    assert "http" not in text.split("</script>")[-2]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = History(["a"], [4], {"flops": 0.5}, 10).write(tmp_path / "empty.jsonl")
    assert main(["report", str(empty), "-o", str(tmp_path / "x.html")]) == 2
    assert "no update was recorded" in capsys.readouterr().err
    assert main(["report"]) == 2
    one = made_up_run().write(tmp_path / "one.jsonl")
    two = made_up_run().write(tmp_path / "two.jsonl")
    assert main(["report", "--compare", str(one), str(two), "-o", str(tmp_path / "x.png")]) == 2
    assert "ends in .html" in capsys.readouterr().err

"""The page of ``dopt report`` in a real browser: sorting, search, histograms, on a phone, and with 2,000 layers."""

import json
import shutil
import time

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from quantized_chain import network

from dopt_api.report import write_report


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page offline; what the browser complains of fails the test."""
    complaints, contexts = [], []

    def open_(file, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def small(tmp_path):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT8-4", "Quant_INT8-7"])
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    return write_report(tmp_path, feeds=[{"x0": x}])


def names(page):
    return page.locator("#layers tbody tr:visible td:first-child").all_inner_texts()


def test_rows_are_sorted_by_text_and_by_number(opened, small):
    page = opened(small)
    heads = page.locator("#layers thead th").all_inner_texts()

    def column(name):
        place = heads.index(name) + 1
        return [float(text) for text in page.locator(f"#layers tbody td:nth-child({place})").all_inner_texts()]

    assert column("SQNR") == sorted(column("SQNR"))  # the most damaged first
    page.get_by_role("button", name="strategy").click()
    assert names(page) == ["layer1", "layer2", "layer0"]
    for name in ("SQNR", "from", "#"):  # negative numbers too, whose texts are ordered otherwise
        head = page.locator(f"#layers th:nth-child({heads.index(name) + 1})")
        for order in ("ascending", "descending"):
            head.locator("button").click()
            assert column(name) == sorted(column(name), reverse=order == "descending")
            assert head.get_attribute("aria-sort") == order


def test_search_leaves_what_fits_and_says_how_many(opened, small):
    page = opened(small)
    page.get_by_label("Search layers").fill("int8-4")
    assert (names(page), page.locator("#shown").inner_text()) == (["layer1"], "1 of 3")
    page.get_by_label("Search layers").fill("")
    assert page.locator("#shown").inner_text() == "3 of 3"


def test_a_layer_opens_to_its_histogram_and_closes(opened, small):
    page = opened(small)
    page.get_by_role("button", name="layer1").click()
    assert page.locator(".detail .bars i").count() == 16
    assert sum(int(bar.get_attribute("title")) for bar in page.locator(".detail .bars i").all()) == 144
    page.get_by_role("button", name="layer1").click()
    assert page.locator(".detail").count() == 0


def test_a_phone_scrolls_tables_and_not_the_page(opened, small, tmp_path):
    page = opened(small, viewport={"width": 360, "height": 640}, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("h1").is_visible()
    assert page.get_by_label("Search layers").bounding_box()["width"] > 200
    page = opened(small)
    assert page.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")


def test_two_thousand_layers_stay_responsive(opened, tmp_path):
    network(tmp_path, ["Quant_INT8-8"])
    content = json.loads((tmp_path / "quant_params.json").read_text())
    (layer,) = content["layers"]
    content["layers"] = [{**layer, "name": f"layer{2000 - number:04}"} for number in range(2000)]
    (tmp_path / "quant_params.json").write_text(json.dumps(content))
    page = opened(write_report(tmp_path))
    begun = time.perf_counter()
    page.get_by_role("button", name="layer", exact=True).click()
    assert page.locator("#layers tbody td").first.inner_text() == "layer0001"
    page.get_by_label("Search layers").fill("layer1999")
    assert page.locator("#shown").inner_text() == "1 of 2000"
    assert time.perf_counter() - begun < 5

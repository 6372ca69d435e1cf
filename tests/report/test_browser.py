"""The page in headless Chromium: what no look at its text can tell."""

import contextlib
import math
import shutil

import pytest
from report_runs import MODELS, make_record, write_run

from new_llm.report import read_runs, write_page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"


@pytest.fixture
def open_page(with_long, tmp_path):
    """Opens the report of a run; at the end nothing may have been loaded from elsewhere, and nothing gone wrong."""
    with_long["models"][2]["evaluation"]["reversal"] = None
    folder = write_run(tmp_path / "four", with_long, *(make_record(with_long, name) for name in MODELS[1:3]))
    write_page(read_runs([folder]), page_file := folder / "report.html")
    requests: list[str] = []
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright, contextlib.ExitStack() as opened:

        def open_in(width: int = 1200, **options):
            options |= {"executable_path": CHROMIUM, "args": FLAGS.split(), "viewport": {"width": width, "height": 900}}
            launch = playwright.chromium.launch_persistent_context
            context = opened.enter_context(launch(tmp_path / "profile", headless=True, **options))
            context.on("request", lambda request: requests.append(request.url))
            page = context.pages[0]
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(page_file.as_uri())
            return page

        yield open_in
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {page_file.as_uri()}


def read_column(page, column: int) -> list[str]:
    return page.eval_on_selector_all(
        "table.summary tbody tr", "(rows, i) => rows.map((row) => row.cells[i].innerText.trim())", column
    )


def test_tables_sort_by_every_column_with_mouse_and_keys(open_page, with_long):
    page = open_page()
    heads = page.locator("table.summary tr.heads th button")
    assert read_column(page, 0) == list(MODELS)
    for column in range(heads.count()):
        heads.nth(column).click()
        values = page.eval_on_selector_all(
            "table.summary tbody tr",
            "(rows, i) => rows.map((row) => Number(row.cells[i].dataset.value))",
            column,
        )
        known = [value for value in values if not math.isnan(value)]
        assert known == sorted(known)
        assert all(math.isnan(value) for value in values[len(known) :])
        assert page.locator("table.summary th[aria-sort=ascending]").count() == 1
    for _ in range(2):
        heads.filter(has_text="backward first").click()
        assert read_column(page, 0)[-1] == "multi_memory"  # what has no value comes last in either order
    sliding = heads.filter(has_text="sliding")
    sliding.focus()
    page.keyboard.press("Enter")
    perplexities = {entry["model_type"]: entry["evaluation"]["sliding"]["perplexity"] for entry in with_long["models"]}
    ranked = sorted(MODELS, key=lambda name: perplexities[name])
    assert read_column(page, 0) == ranked
    page.keyboard.press("Enter")
    assert read_column(page, 0) == ranked[::-1]


def test_figures_answer_the_mouse(open_page):
    page = open_page()
    for axis in ("compute", "seconds", "tokens"):  # views of one name switch together
        page.click(f"#validation button[data-view={axis}]")
        for chart in ("validation", "training-loss", "gates-training"):
            shown = page.locator(f"#{chart} .view:visible")
            assert shown.count() == 1
            assert shown.get_attribute("data-view") == axis
            assert page.locator(f"#{chart} button[aria-pressed=true][data-view={axis}]").count() == 1
    labels = ".view:visible .drawn:visible svg text"
    for chart, is_log in (("validation", True), ("training-loss", False)):
        switch, before = page.locator(f"#{chart} .scale"), page.locator(f"#{chart} {labels}").all_text_contents()
        assert switch.get_attribute("aria-pressed") == str(is_log).lower()
        switch.click()
        assert switch.get_attribute("aria-pressed") == str(not is_log).lower()
        assert page.locator(f"#{chart} .drawn:visible").count() == 1
        assert page.locator(f"#{chart} {labels}").all_text_contents() != before
    assert page.locator("#reversal .scale").count() == 0  # bars begin at zero
    tips = page.locator("#validation .view:visible title").all_text_contents()
    assert any(tip.startswith("infini: ") and "training tokens" in tip for tip in tips)
    key = page.locator("#positions .key button", has_text="infini")
    drawn = page.locator("#positions svg [stroke='var(--series-1)'], #positions svg [fill='var(--series-1)']")
    assert drawn.count() > 1
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert not any(drawn.nth(i).is_visible() for i in range(drawn.count()))
    key.click()
    assert drawn.first.is_visible()
    page.locator(".copy").first.click()
    page.wait_for_function("document.querySelector('.copy').textContent !== 'Copy'")
    assert page.locator(".copy").first.inner_text() == "Copied"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_system_s_until_it_is_changed(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(ground)
    assert (sum(int(part) for part in first[4:-1].split(",")) < 200) == (scheme == "dark")
    page.click("#the_theme")
    assert page.evaluate(ground) != first


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_nothing_scrolls_sideways_but_tables(open_page, width):
    page = open_page(width)
    page.eval_on_selector_all("details", "(all) => all.forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = """(all, w) => all.filter((e) => e.getBoundingClientRect().right > w + 1 && !e.closest('.scroll, pre'))
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.eval_on_selector_all("body *:not(script)", wide, width) == []


def test_letters_of_charts_can_be_read_on_a_phone(open_page):
    page = open_page(390)
    heights = page.eval_on_selector_all(
        ".view:not([hidden]) svg text",
        "(all) => all.map((e) => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)",
    )
    assert min(heights) >= 9.5
    cut = """(all) => all.filter((e) => {
      const [box, outer] = [e.getBoundingClientRect(), e.ownerSVGElement.getBoundingClientRect()];
      return box.left < outer.left - 6 || box.right > outer.right + 8;
    }).map((e) => e.textContent)"""
    assert page.eval_on_selector_all(".view:not([hidden]) svg text", cut) == []


def test_without_a_script_everything_is_there(open_page):
    page = open_page(java_script_enabled=False)
    hidden = page.locator(".view[hidden]")
    assert hidden.count() > 10
    assert all(hidden.nth(i).is_visible() for i in range(hidden.count()))
    assert page.locator("button:visible").count() == 0
    assert page.locator("table.summary tbody tr").count() == len(MODELS)

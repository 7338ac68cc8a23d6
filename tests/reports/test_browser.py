"""The pages in a real browser: no errors, no network, both themes, phone and paper, keyboard.

Chromium or Chrome is found on the path. Without one these tests are skipped, unless
QKD_JAX_BROWSER=required, as in the workflow of GitHub.
"""

import os
import shutil

import numpy as np
import pytest

from qkd_jax.reports.charts import line_chart
from qkd_jax.reports.render import rendered
from qkd_jax.reports.results import write_results
from qkd_jax.reports.run_page import write_report
from tests.reports.fake_run import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None and os.environ.get("QKD_JAX_BROWSER") != "required",
    reason="no Chromium on the path",
)
PHONE, SCREEN, A4 = (360, 740), (1280, 900), (794, 1123)
CONTRAST = 4.5  # of text, WCAG 2.2, level AA


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(quiet))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run, and that of a comparison of twelve methods with two seeds."""
    experiment = tmp_path_factory.mktemp("runs") / "toy"
    for n in range(12):
        for seed in (1, 2):
            folder = experiment / f"a_method_with_a_long_name_{n}/seed{seed}"
            write_run(folder, num_tasks=4, seed=seed, average_accuracy=70.0 + n + seed / 10)
    write_results(experiment)
    folder = tmp_path_factory.mktemp("long") / "seed1"
    write_run(folder, num_tasks=6)
    return {"run": write_report(folder), "comparison": experiment / "report.html"}


@pytest.fixture
def opened(browser, pages):
    """open(name, size, theme) -> a page that fails the test on any error or request."""
    contexts, problems = [], []

    def open_page(name, size=SCREEN, theme="light"):
        width, height = size
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        path = pages[name].as_uri()
        page.on("request", lambda r: r.url.startswith(("data:", path)) or problems.append(r.url))
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("size", [PHONE, SCREEN, A4])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_nothing_is_wider_than_the_window(opened, name, size):
    page = opened(name, size)
    if size == A4:
        page.emulate_media(media="print")
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]
    # A chart and a table are seen, so the page is not simply empty.
    assert page.locator("svg[role=img]").first.is_visible()
    assert page.locator("table").first.is_visible()


def luminance(rgb):
    share = np.asarray(rgb, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


# The colours of the text of each element that has any, and of what lies behind it, in sRGB.
COLOURS = """() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const found = [];
  const all = document.querySelectorAll("h1,h2,p,td,th,span,strong,li,a,pre,button,.tick");
  for (const element of all) {
    const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement ? style.fill : style.color;
    let behind = element;
    const clear = () => rgba(getComputedStyle(behind).backgroundColor)[3] === 0;
    while (behind && clear()) behind = behind.parentElement;
    const paper = behind ? getComputedStyle(behind).backgroundColor : "white";
    found.push([element.textContent.trim().slice(0, 40), rgba(drawn), rgba(paper)]);
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_all_text_can_be_read_in_both_themes(opened, name, theme):
    page = opened(name, theme=theme)
    found = page.evaluate(COLOURS)
    assert len(found) > 50
    dark = luminance(found[0][2][:3]) < 0.2
    assert dark == (theme == "dark")
    for text, ink, paper in found:
        high, low = sorted((luminance(ink[:3]), luminance(paper[:3])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= CONTRAST, (text, ink, paper)


def test_a_chart_tells_its_numbers_to_the_pointer_and_to_the_keys(opened):
    page = opened("run")
    chart = page.locator("figure.chart").first
    box, tip = chart.locator(".plot svg"), chart.locator(".tip")
    assert not tip.is_visible()
    size = box.bounding_box()
    box.hover(position={"x": size["width"] * 0.98, "y": size["height"] / 2})
    assert "after task 6" in tip.inner_text() and "87.50" in tip.inner_text()
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    box.focus()
    page.keyboard.press("Home")
    assert "after task 1" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "after task 2" in tip.inner_text()
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert "after task 6" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_click_on_a_name_hides_its_line(opened):
    page = opened("comparison")
    chart = page.locator("figure.chart").first
    button = chart.locator(".legend button").first
    button.click()
    assert chart.locator(".series.hidden").count() == 1
    assert button.get_attribute("aria-pressed") == "false"
    chart.locator(".plot svg").focus()
    page.keyboard.press("Home")
    assert button.inner_text() not in chart.locator(".tip").inner_text().split("\n")
    button.click()
    assert chart.locator(".series.hidden").count() == 0


def column(page, index):
    return page.locator("table.sortable").first.locator(f"tbody tr td:nth-child({index})")


def test_a_table_is_sorted_by_a_click_or_a_key_on_its_head(opened):
    page = opened("comparison")
    head = page.locator("table.sortable").first.locator("thead button").nth(2)
    before = column(page, 3).all_inner_texts()
    assert before == sorted(before, reverse=True)  # best first
    head.click()
    assert column(page, 3).all_inner_texts() == before[::-1]
    head.focus()
    page.keyboard.press("Enter")
    assert column(page, 3).all_inner_texts() == before
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_a_page_prints_on_a4(opened, tmp_path):
    pdf = opened("run").pdf(prefer_css_page_size=True)
    # Widths and heights in points: 210 x 297 mm.
    assert pdf.startswith(b"%PDF") and b"/MediaBox [0 0 594.95996 841.91998]" in pdf


def test_what_a_name_says_is_never_markup(opened, pages, tmp_path):
    evil = '<img src=x onerror="document.title=1">"&\'</script>'
    chart = line_chart(evil, {evil: [1.0, 2.0]}, [evil, evil], x_label=evil)
    facts = {"title": evil, "words": evil, "remarks": [evil], "curves": chart, "ranks": None}
    table = {"heads": (evil,), "rows": [[evil]]}
    facts |= {"taught": table, "explanation": evil}
    page = tmp_path / "evil.html"
    page.write_bytes(rendered("comparison.html", facts | {"accuracy": table, "costs": table}))
    pages["evil"] = page
    shown = opened("evil")
    assert shown.locator("img").count() == 0
    assert shown.locator("h1").inner_text() == shown.title() == evil
    shown.locator(".plot svg").focus()
    shown.keyboard.press("Home")
    assert evil in shown.locator(".tip").inner_text()

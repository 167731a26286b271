"""The report in a real browser: it draws without a complaint or a request, and answers to mouse, keys and widths."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from reported import gathered, make_runs

from segadapt.report import page

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, compose_settings, saved_models):
    root = tmp_path_factory.mktemp("runs")
    make_runs(root, compose_settings, saved_models)
    path = root / page.NAME
    path.write_text(page.render(gathered(root), title="runs"))
    return path.as_uri()


@pytest.fixture
def opened(browser, address):
    """opened(width, scheme): the page, drawn; at the end nothing was complained of and nothing asked for."""
    wrong, contexts = [], []

    def open_page(width=1280, scheme="light", at=address):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        view = context.new_page()
        view.on("console", lambda message: wrong.append(message.text))
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.on("request", lambda asked: wrong.extend([asked.url] * (not asked.url.startswith(("file:", "data:")))))
        view.goto(at)
        view.wait_for_selector("body[data-ready=true]")
        return view

    yield open_page
    assert wrong == []
    for context in contexts:
        context.close()


def clip_of(view, side):
    return view.eval_on_selector(f"#stage .{side}", "image => image.style.clipPath")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_draws_every_chart_that_is_seen(opened, width, scheme):
    view = opened(width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") == width
    charts = view.query_selector_all(".chart:visible")
    assert len(charts) >= 10
    for chart in charts:
        box = chart.query_selector(".main-svg").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["height"] >= 150
    back = view.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").rstrip(")")
    assert (max(map(int, back.split(","))) < 60) == (scheme == "dark")


def test_page_is_narrowed_while_it_is_open(opened):
    view = opened(1280)
    view.set_viewport_size({"width": 390, "height": 800})
    view.wait_for_function("document.querySelector('.chart .main-svg').getBoundingClientRect().width < 390")
    assert view.evaluate("document.documentElement.scrollWidth") == 390


def test_switch_turns_light_to_dark_and_back(opened):
    view, back = opened(), "getComputedStyle(document.body).backgroundColor"
    label = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    light, light_label = view.evaluate(back), view.evaluate(label)
    view.click("#theme")
    view.wait_for_function(f"{label} !== '{light_label}'")
    assert view.evaluate(back) != light
    assert view.get_attribute("#theme", "aria-pressed") == "true"
    view.click("#theme")
    assert view.evaluate(back) == light


def test_slider_moves_by_keys_and_by_mouse(opened):
    view = opened()
    assert clip_of(view, "right") == "inset(0px 0px 0px 50%)"
    view.focus("#slider")
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    assert view.input_value("#slider") == "53"
    assert clip_of(view, "right") == "inset(0px 0px 0px 53%)"
    assert clip_of(view, "left") == "inset(0px 47% 0px 0px)"
    view.locator("#stage").scroll_into_view_if_needed()
    box = view.locator("#stage").bounding_box()
    view.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    view.mouse.down()
    view.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
    view.mouse.up()
    assert abs(int(view.input_value("#slider")) - 20) <= 1


def test_overlays_are_chosen_and_faded(opened):
    view = opened()
    left = view.get_attribute("#stage .left", "src")
    view.select_option("#left", "label")
    assert view.get_attribute("#stage .left", "src") != left
    view.select_option("#left", "image")
    assert not view.is_visible("#stage .left")
    view.fill("#opacity", "30")
    assert view.eval_on_selector("#stage .right", "image => image.style.opacity") == "0.3"


def test_arrow_keys_walk_through_the_gallery(opened):
    view = opened()
    first = view.inner_text("#caption")
    view.focus(".thumb[aria-pressed=true]")
    view.keyboard.press("ArrowRight")
    assert view.inner_text("#caption") != first
    assert view.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert view.locator(".thumb:visible[tabindex='0']").count() == 1
    view.keyboard.press("ArrowLeft")
    assert view.inner_text("#caption") == first
    legend = view.locator("#legend tr")
    assert legend.count() >= 2


def test_headings_sort_the_table_by_keyboard(opened):
    view = opened()

    def values():
        return view.eval_on_selector_all(
            "#table tbody tr", "rows => rows.map(row => Number(row.children[2].dataset.value))"
        )

    view.focus("#table thead th:nth-child(3) button")
    view.keyboard.press("Enter")
    assert values() == sorted(values(), reverse=True)
    assert view.get_attribute("#table thead th:nth-child(3)", "aria-sort") == "descending"
    view.keyboard.press("Enter")
    assert values() == sorted(values())
    view.click("#table thead th:nth-child(1) button")
    names = view.eval_on_selector_all("#table tbody th", "cells => cells.map(cell => cell.textContent)")
    assert names == ["contrast/5", "fog/5"]
    assert view.get_attribute("#table thead th:nth-child(3)", "aria-sort") == "none"


def test_a_task_is_chosen_for_the_classes(opened):
    view, texts = opened(), ".chart[data-family] .bartext"
    before = view.eval_on_selector_all(texts, "all => all.map(one => one.textContent)")
    view.select_option("#task", label="contrast/5")
    after = view.eval_on_selector_all(texts, "all => all.map(one => one.textContent)")
    assert len(before) >= 2
    assert after != before


def test_tab_reaches_every_control_from_the_top_down(opened):
    view, reached = opened(), []
    for _ in range(60):
        view.keyboard.press("Tab")
        reached.append(view.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = ["skip", "theme", "task", "thumb", "slider", "left", "right", "opacity"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted


def test_printed_page_is_light_and_without_controls(opened):
    view = opened(1280, "dark")
    view.evaluate("dispatchEvent(new Event('beforeprint'))")
    view.emulate_media(media="print")
    assert view.get_attribute("html", "data-theme") == "light"
    assert not view.is_visible("#theme")
    assert not view.is_visible("#slider")
    assert view.is_visible("#table")


def test_a_report_of_one_run_is_drawn_too(opened, tmp_path, address):
    root = Path(urlsplit(address).path).parent
    path = tmp_path / page.NAME
    path.write_text(page.render(gathered(root / "source"), title="one"))
    view = opened(390, at=path.as_uri())
    assert view.locator(".thumb:visible").count() > 0
    assert view.inner_text("#stage .at-left") == "label"
    assert view.evaluate("document.documentElement.scrollWidth") == 390

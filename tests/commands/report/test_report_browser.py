# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, without a network: drawn, readable, safe. With CI=true it must be there."""

import colorsys
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_text import HOSTILE
from report_pages import hostile_run, sentence, surge_entries, write_log, write_tokens

from dc_trl.commands.report.command import report_command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if os.environ.get("CI") != "true":
    pytest.importorskip("playwright", reason="the report is looked at through playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH", allow_module_level=True)

from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Locator, Page, sync_playwright  # noqa: E402

# Place in completion 0 → π, μ; every other token has 0.9 and 0.9.
KNOWN = {2: (0.5, 0.75), 5: (1e-5, 1e-2), 7: (0.6, 0.5)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "CI is 'true' and no Chromium is on PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """A page that is open, and everything that went wrong on it."""

    def __init__(
        self, browser: Browser, path: Path, width: int = 1280, scheme: Any = "light", motion: Any = "reduce"
    ) -> None:
        self.context = browser.new_context(
            offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion=motion
        )
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#chart-reward .scatterlayer path", state="attached")

    def _request(self, request: Any) -> None:
        if not request.url.startswith("file:"):
            self.wrong.append(f"request: {request.url}")

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, *error: Any) -> None:
        self.context.close()
        if error[0] is None:
            assert self.wrong == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a run with a surge and two token logs."""
    folder = write_log(tmp_path_factory.mktemp("plain") / "run", surge_entries())
    write_tokens(folder, 30, sentence(0, ["older", " step"]))
    rows = sentence(0, ["The", " sum", " of", " two", " and", "\n", " is", " three", "."], token_id=123)
    for row in rows:
        row |= {"train_logp": math.log(0.9), "sampling_logp": math.log(0.9)}
    for place, (pi, mu) in KNOWN.items():
        rows[place] |= {"train_logp": math.log(pi), "sampling_logp": math.log(mu), "discrepancy": abs(pi - mu)}
    rows[8] |= {"valid": False}
    write_tokens(folder, 60, rows + sentence(1, ["another", " one"], prompt="Why?"))
    report_command([str(folder)])
    return folder / "report.html"


def token(page: Page, place: int) -> Locator:
    return page.locator(f'.tokens[data-completion="0"] [data-i="{place}"]')


def picture(page: Page, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


def saturation(page: Page, span: Locator) -> float:
    """How colourful a token's background is, in its upper left corner, where no glyph is."""
    span.scroll_into_view_if_needed()
    box = span.bounding_box()
    assert box is not None
    red, green, blue = picture(page).getpixel((round(box["x"] + box["width"] / 2), round(box["y"] + 2)))
    return colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[1]


def test_every_chart_is_drawn(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        charts = page.locator("[data-figure]")
        assert charts.count() >= 4
        for chart in charts.all():
            line = chart.locator(".scatterlayer .trace path.js-line").first.get_attribute("d")
            assert line is not None and line.count(",") + line.count("L") >= 2
            assert chart.evaluate("chart => chart.data.every(trace => trace.x.length > 0)")
        assert page.locator("#chart-length .shapelayer path").count() == 2  # surge and halving
        assert page.get_by_text("surge, 20").count() == 2
        for chart in ("buckets", "log_ratios", "positions"):
            assert page.locator(f"#chart-{chart} .bars path").count() > 0
        assert page.locator("#chart-probabilities .points path").count() == 10  # one of eleven is not valid


def test_no_button_sends_anything_away_or_hides_a_title(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain, width=390) as page:
        for chart in page.locator("[data-figure]").all():
            chart.hover()
            buttons = [button.get_attribute("data-title") for button in chart.locator(".modebar-btn").all()]
            assert buttons == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]
            bar, titles = chart.locator(".modebar").bounding_box(), chart.locator(".infolayer .annotation").all()
            assert titles
            for box in (title.bounding_box() for title in titles):
                beside = box["x"] + box["width"] <= bar["x"] or bar["x"] + bar["width"] <= box["x"]
                assert beside or box["y"] >= bar["y"] + bar["height"] or box["y"] + box["height"] <= bar["y"]


def test_pointing_at_a_token_shows_its_probabilities(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        tip = page.locator("#tip")
        assert tip.is_hidden()
        token(page, 2).hover()
        terms = dict(zip(tip.locator("dt").all_text_contents(), tip.locator("dd").all_text_contents(), strict=True))
        assert terms == {"π": "0.5", "μ": "0.75", "|π − μ|": "0.25", "log π/μ": "-0.4055", "penalty": "0"}
        assert " of" in tip.inner_text() and "id 123, position 2" in tip.inner_text()
        box = tip.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 1280
        token(page, 8).hover()
        assert "Not valid" in tip.inner_text()
        page.mouse.move(5, 5)
        assert tip.is_hidden()


def test_the_keyboard_reaches_every_token(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        page.locator(".tokens").first.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert "position 2" in page.locator("#tip").inner_text()
        page.keyboard.press("ArrowLeft")
        assert "position 1" in page.locator("#tip").inner_text()
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.locator("#top-tokens button").first.click()
        assert "position 2" in page.locator("#tip").inner_text()  # the largest discrepancy


def test_shading_follows_the_discrepancy(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        none, medium, high = (saturation(page, token(page, place)) for place in (3, 7, 2))
        assert none < 0.02 and none + 0.1 < medium < high - 0.2
        assert saturation(page, token(page, 5)) < medium  # |π − μ| does not see the tail
        page.get_by_label("|log π − log μ|").check()
        assert saturation(page, token(page, 5)) > saturation(page, token(page, 2)) + 0.3
        assert page.locator("#top-tokens mark").first.inner_text() == "↵"


# Whether the current token is in sight and moves no longer.
AT_REST = """new Promise((done) => {
  const top = () => document.querySelector(".token.current").getBoundingClientRect().top;
  const before = top();
  setTimeout(() => done(before === top() && before >= 0 && before <= innerHeight), 300);
})"""


def wait_until(page: Page, expression: str) -> None:
    """Waits until JavaScript is true; `wait_for_function` polls by `eval`, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {expression}")


def test_a_link_to_a_token_keeps_its_highlight_while_the_page_scrolls_smoothly(
    browser: Browser, tmp_path: Path
) -> None:
    folder = write_log(tmp_path / "run", surge_entries())
    rows = [row for c in range(16) for row in sentence(c, ["word "] * 300, token_id=c)]
    rows[-1] |= {"discrepancy": 0.5, "sampling_logp": -1.0}  # far down the page
    write_tokens(folder, 60, rows)
    report_command([str(folder)])
    with Visit(browser, folder / "report.html", motion="no-preference") as page:
        page.locator("#top-tokens button").first.click()
        current = page.locator(".token.current")
        assert current.get_attribute("data-i") == "299" and current.count() == 1
        wait_until(page, AT_REST)
        box = current.bounding_box()
        assert box is not None and 0 <= box["y"] <= 900
        assert "position 299" in page.locator("#tip").inner_text()
        page.mouse.wheel(0, -5_000)  # out of sight, and back
        wait_until(page, "document.getElementById('tip').hidden")
        assert current.count() == 1
        page.keyboard.press("Escape")
        assert current.count() == 0


def test_a_click_on_a_chart_opens_the_tokens_of_the_nearest_step(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        box = page.locator("#chart-reward .nsewdrag").bounding_box()
        assert box is not None
        page.locator("#chart-reward").scroll_into_view_if_needed()
        for share, step, asked in ((0.4, "30", 24), (0.98, "60", 59)):
            box = page.locator("#chart-reward .nsewdrag").bounding_box()
            assert box is not None
            place = box["x"] + box["width"] * share, box["y"] + box["height"] / 2
            page.mouse.move(*place)
            page.mouse.move(place[0] + 1, place[1])
            page.wait_for_selector("#chart-reward .hoverlayer text")
            page.mouse.click(place[0] + 1, place[1])
            page.wait_for_selector("#token-asked:not([hidden])")
            words = page.locator("#token-asked").inner_text()
            clicked = int("".join(c for c in words.partition(":")[0].partition(", which")[0] if c.isdigit()))
            assert abs(clicked - asked) <= 2 and f"tep {step}" in words
            chosen = page.locator("#token-step option:checked").inner_text()
            assert chosen.startswith(step)
            page.locator("#chart-reward").scroll_into_view_if_needed()
        assert page.locator("#token-step option").all_inner_texts() == [
            "60 (newest, largest discrepancy)",
            "30 (first)",
        ]


def test_a_completion_says_its_reward_its_answer_and_the_gold_one(browser: Browser, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", surge_entries())
    rows = sentence(0, ["a", "b"], reward=1.0, answer="<b>92", gold="92")
    rows += sentence(1, ["c"], reward=0.0, answer=None, gold="7", token_id=8, rejected=True)
    rows += sentence(2, ["d"], reward=math.nan, answer=None, gold=None, token_id=9)
    write_tokens(folder, 60, rows)
    report_command([str(folder)])
    with Visit(browser, folder / "report.html") as page:
        facts = [item.locator("li").all_inner_texts() for item in page.locator(".facts").all()]
        assert facts[0][:3] == ["reward 1", "answer <b>92", "gold 92"]
        assert facts[1][:3] == ["reward 0", "no answer found", "gold 7"]
        assert facts[2][0] == "1 tokens"
        page.locator(".token.rejected").hover()
        assert "Rejected by a rule" in page.locator("#tip").inner_text()


def test_axes_can_be_logarithmic_where_nothing_is_below_zero(browser: Browser, tmp_path: Path) -> None:
    entries = [{"step": s, "reward": 10.0**s, "dc/kl": 0.1, "dc/chi2_token": (-1.0) ** s} for s in (1, 2, 3)]
    folder = write_log(tmp_path / "run", entries)
    write_tokens(folder, 3, sentence(0, ["a", "b", "c"], discrepancy=0.1, sampling_logp=-0.2))
    report_command([str(folder)])
    kinds = "name => document.getElementById(name)._fullLayout.yaxis.type"
    with Visit(browser, folder / "report.html") as page:
        charts = ("chart-reward", "chart-chi2_token", "chart-buckets", "chart-log_ratios")
        assert [page.evaluate(kinds, name) for name in charts] == ["linear"] * 4
        page.get_by_label("logarithmic axes").check()
        assert [page.evaluate(kinds, name) for name in charts] == ["log", "linear", "log", "log"]
        assert page.evaluate("document.getElementById('chart-probabilities')._fullLayout.xaxis.type") == "log"
        page.get_by_label("logarithmic axes").uncheck()
        assert [page.evaluate(kinds, name) for name in charts] == ["linear"] * 4


def test_another_step_can_be_chosen(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        page.get_by_label("Step").select_option("30 (first)")
        assert page.locator(".tokens").all_inner_texts() == ["older step"]
        page.locator(".completion summary").click()
        assert page.locator(".prompt").inner_text() == "p"


# The contrast of an element's text with what is behind it, by WCAG 2.
CONTRAST = """element => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  let behind = element;
  while ((parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const text = luminance(parts(getComputedStyle(element).color));
  const ground = luminance(parts(getComputedStyle(behind).backgroundColor));
  return (Math.max(text, ground) + .05) / (Math.min(text, ground) + .05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_are_words_too_and_every_word_is_readable(browser: Browser, tmp_path: Path, scheme: str) -> None:
    values = {"dc/discrepancy/mean": 0.004, "dc/tolerance": 0.005, "dc/ess": 0.1, "dc/penalty_share": 0.2}
    folder = write_log(tmp_path, [{"step": step, "reward": 0.5} | values for step in (1, 2)])
    report_command([str(folder)])
    with Visit(browser, folder / "report.html", scheme=scheme) as page:
        assert page.locator(".verdict h2").inner_text() == "✕ red 1 out of range, 1 to look into, 1 in range"
        page.locator(".verdict summary").click()
        assert page.locator(".verdict .judged .badge").all_inner_texts() == ["✕ red", "! amber", "✓ green"]
        for text in page.locator(".verdict :is(h2, h3, p, .badge, a, summary, code, .value)").all():
            assert text.evaluate(CONTRAST) >= 4.5, text.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_screenshot_has_content_in_both_themes(browser: Browser, plain: Path, scheme: str) -> None:
    with Visit(browser, plain, scheme=scheme) as page:
        image = picture(page, full_page=True)
        colors = image.getcolors(image.width * image.height)
        assert colors is not None and image.height > 3000 and len(colors) > 300
        count, background = max(colors)
        assert count < 0.9 * image.width * image.height
        assert (sum(background) > 3 * 200) == (scheme == "light")
        text = page.locator("#chart-reward .xtick text").first
        color = text.evaluate("text => getComputedStyle(text).fill")
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        changed = "was => getComputedStyle(document.querySelector('#chart-reward .xtick text')).fill !== was"
        page.wait_for_function(changed, arg=color)


def test_no_width_scrolls_sideways(browser: Browser, plain: Path) -> None:
    with Visit(browser, plain) as page:
        for width, expected in ((390, 1), (820, 2), (1600, 2)):
            page.set_viewport_size({"width": width, "height": 900})
            fits = "w => [...document.querySelectorAll('.chart svg')].every(s => s.getBoundingClientRect().right <= w)"
            page.wait_for_function(fits, arg=width)  # charts follow with a delay
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            panels = [panel.bounding_box() for panel in page.locator("#run .panel").all()]
            assert len({round(box["x"]) for box in panels if box}) == expected


def test_hostile_text_does_nothing_and_is_there_to_read(browser: Browser, tmp_path: Path) -> None:
    name = '"><img src=x onerror=window.pwned=1><a href="javascript:window.pwned=1">%{x}'.replace("/", "")
    folder = hostile_run(tmp_path / name)
    other = hostile_run(tmp_path / "<script>window.pwned=1<script>")
    report_command([str(folder), str(other), "--output", str(tmp_path / "page.html")])
    with Visit(browser, tmp_path / "page.html", width=390) as page:
        for span in page.locator(".token").all()[: len(HOSTILE)]:
            span.hover()
            span.click()
        for summary in page.locator("summary").all():
            summary.click()
        page.locator("#chart-reward").hover()
        assert page.evaluate("window.pwned") is None
        assert page.locator("img, a[href^='javascript'], [onload], [onerror], [onmouseover]").count() == 0
        assert page.evaluate("[...document.querySelectorAll('a')].filter(a => !a.hash).length") == 0
        assert page.locator("script").count() == 4
        assert HOSTILE[0] in page.locator(".token").first.inner_text()
        assert "<img src=x" in page.locator("#chart-reward .legendtext").first.text_content()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

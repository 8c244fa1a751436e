"""report.html in a browser, on a desktop and a phone: its controls, that it makes no requests, and how fast it opens."""

import json
import shutil
import time

import numpy as np
import pytest
from browser_fixtures import DEVICES, wait_for
from PIL import Image

from text_to_image_lora.reports import report_page, sample_pictures


pytestmark = pytest.mark.long
EVIL = "an axe</script><script>alert(1)</script><img src=http://example.invalid/x onerror=alert(2)>"
STEPS = (20, 40, 60)


def draw_all(page):
    """Scrolls to every chart, as charts are drawn when they become visible."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.evaluate("element => element.scrollIntoView()")
    wait_for(page, "charts", "[...document.querySelectorAll('.chart')].every(chart => chart.dataset.drawn)")


@pytest.fixture(scope="module")
def real_run(train_on_weapons, tmp_path_factory):
    """A short run of the embedded base on the bundled weapons."""
    return train_on_weapons(
        tmp_path_factory.mktemp("run") / "weapons", max_train_steps=STEPS[-1], validation_steps=STEPS[0], rank=4,
        learning_rate=2e-3, validation_data_dir="metadata/weapons_test", num_validation_images=2,
        validation_prompts=["a green axe with pink blossoms on a white background", EVIL], validation_inference_steps=4,
    )  # fmt: skip


def shown_in(page):
    """Returns the steps of the visible pictures."""
    return page.evaluate("[...document.querySelectorAll('.film a:not([hidden])')].map(each => +each.dataset.step)")


def test_the_slider_steps_through_training(real_run, open_page):
    page = open_page(real_run / report_page.FILE)
    assert shown_in(page) == [0, STEPS[-1]] * 4
    slider = page.locator("#step")
    slider.focus()
    for step in reversed(STEPS[:-1]):
        page.keyboard.press("ArrowLeft")
        assert shown_in(page) == [0, step] * 4
        assert page.locator("#step-shown").text_content() == str(step)
    page.get_by_role("button", name="last").click()
    assert shown_in(page) == [0, STEPS[-1]] * 4
    for image in page.locator(".film a:not([hidden]) img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth") == 128
        width, height = image.evaluate("image => [image.clientWidth, image.clientHeight]")
        assert abs(width - height) <= 1
        assert width > 100


def test_a_chart_is_zoomed_and_the_others_follow(real_run, open_page):
    page = open_page(real_run / report_page.FILE)
    draw_all(page)
    ranges = "Bokeh.documents.map(each => each.roots()[0].x_range).map(range => [range.start, range.end])"
    whole = page.evaluate(ranges)
    assert len(whole) == page.locator(".chart").count() >= 7
    assert all(each == whole[0] for each in whole)
    plot = page.locator(".plot").first
    plot.evaluate("element => element.scrollIntoView({block: 'center'})")
    box = plot.bounding_box()
    left, right, middle = box["x"] + 0.4 * box["width"], box["x"] + 0.7 * box["width"], box["y"] + 80
    if page.device == "phone":
        pinch = {"x": left, "y": middle, "scaleFactor": 2, "gestureSourceType": "touch"}
        session = page.context.new_cdp_session(page)
        for _ in range(4):  # a busy machine drops most events of a gesture
            session.send("Input.synthesizePinchGesture", pinch)
    else:
        page.mouse.move(left, middle)
        page.mouse.down()
        page.mouse.move(right, middle, steps=5)
        page.mouse.up()
    narrower = 0.9 * (whole[0][1] - whole[0][0])
    shown = "(document.getElementById('curves').dataset.shown || '0 1e9').split(' ')"
    wait_for(page, "zoomed", f"(([start, end]) => end - start < {narrower})({shown})")
    zoomed = page.evaluate(ranges)
    assert all(each == zoomed[0] for each in zoomed)
    page.get_by_role("button", name="Show all steps").click()
    assert page.evaluate(ranges) == whole


def test_one_finger_scrolls_the_page_over_charts(real_run, open_page):
    page = open_page(real_run / report_page.FILE)
    draw_all(page)
    found = page.evaluate("""() => {
        const found = [], look = (root) => root.querySelectorAll("*").forEach((each) => {
            if (each.classList.contains("bk-events")) found.push(getComputedStyle(each).touchAction);
            if (each.shadowRoot) look(each.shadowRoot);
        });
        look(document);
        return found;
    }""")
    assert len(found) == page.locator(".chart").count()
    if page.device == "phone":
        assert set(found) == {"pan-x pan-y"}


def test_the_command_is_copied(real_run, open_page):
    page = open_page(real_run / report_page.FILE)
    page.locator("[data-copy]").click()
    wait_for(page, "copied", "document.querySelector('[data-copy]').textContent === 'Copied'")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#command").text_content()
    whole = json.loads((real_run / "about.json").read_text())["command"]
    assert command.split(" --")[:2] == whole.split(" --")[:2]
    assert command.count(" --") == whole.count(" --")
    assert str(real_run.parent) not in command  # the page shows only the names of folders elsewhere


def test_it_is_no_wider_than_the_screen(real_run, open_page):
    page = open_page(real_run / report_page.FILE)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == DEVICES[page.device]["viewport"]["width"]


def test_several_runs_are_compared(real_run, open_page, tmp_path):
    for number in range(2):
        shutil.copytree(real_run, tmp_path / f"trial-{number:04d}")
    page = open_page(
        report_page.write_comparison(report_page.find_runs([tmp_path]), tmp_path / "report.html", "sweep")
    )
    assert shown_in(page) == [0, STEPS[-1], STEPS[-1]] * 4
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert shown_in(page) == [0, STEPS[0], STEPS[0]] * 4
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == DEVICES[page.device]["viewport"]["width"]


def test_a_long_run_opens_in_two_seconds(open_page, tmp_path):
    """800 steps and 60 pictures of 512 pixels."""
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, "train_loss": rng.random(), "lr": 1e-4, "grad_norm": rng.random()} for step in range(1, 801)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(0, 800, 80):
        small = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
        large = [image.resize((512, 512), Image.Resampling.BICUBIC) for image in small]
        images = {f"prompt-00-{k}": (image, {"prompt": "noise", "seed": k}) for k, image in enumerate(large)}
        sample_pictures.save_pictures(tmp_path / "validation" / f"step-{step:06d}", images)
    path, took = report_page.write_page(tmp_path), []
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        open_page(path)
        took.append(time.perf_counter() - start)
    assert min(took) < 2

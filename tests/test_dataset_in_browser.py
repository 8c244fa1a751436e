"""dataset.html in a browser, on a desktop and a phone: captions are edited, found and saved, and it opens quickly."""

import json
import time

import pytest
from browser_fixtures import DEVICES, wait_for
from conftest import make_picture_set, read_records, write_pictures
from PIL import Image

from text_to_image_lora.pictures import settings
from text_to_image_lora.pictures.caption_tables import caption_tables
from text_to_image_lora.pictures.layouts import ReadOptions
from text_to_image_lora.reports import dataset_page


pytestmark = pytest.mark.long
EVIL = "an axe</script><script>alert(1)</script><img src=http://example.invalid/x onerror=alert(2)>"
CAPTIONS = [EVIL, "a red axe", "a blue spear", "a green spear, \"long\"", "a whip", "a red whip", "a trident"]  # fmt: skip


def write_page(folder, path, pictures=None):
    data = settings.DataSettings(train_data_dir=(str(folder),))
    tables = caption_tables(ReadOptions(data, settings.CaptionSettings()))
    pictures = make_picture_set(folder) if pictures is None else pictures
    shown = dataset_page.Data(pictures, None, [], [2], [], tables, [])
    dataset_page.write_dataset_page(path, shown, title="Pictures")
    return path


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "set", count=7, size=(60, 32), captions=CAPTIONS)


@pytest.fixture
def page(folder, tmp_path, open_page):
    return open_page(write_page(folder, tmp_path / "dataset.html"))


def names(page):
    return page.locator(".picture .name").all_text_contents()


def caption(page, name):
    return page.get_by_label(f"Caption of {name}")


def saved(page, press):
    """Returns the rows of the file that is downloaded, and its name."""
    with page.expect_download() as waiting:
        press()
    return [
        json.loads(line) for line in waiting.value.path().read_text(encoding="utf-8").splitlines()
    ], waiting.value.suggested_filename


def test_captions_are_edited_and_saved_and_trained_on(page, folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    button = page.locator("#save")
    assert button.is_disabled()
    assert caption(page, "0.png").input_value() == EVIL
    caption(page, "2.png").fill("a blue spear with a rope")
    card = page.locator(".picture", has=page.get_by_text("5.png"))
    card.get_by_label("leave this picture out").check()
    assert button.text_content() == "Save 2 edits"
    found, name = saved(page, button.click)
    assert name == "metadata.jsonl"
    rows[2]["text"] = "a blue spear with a rope"
    assert found == rows[:5] + rows[6:]
    assert "with 6 rows. Save it as metadata.jsonl in the folder" in page.locator("#saved").text_content()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    records = read_records(folder)
    assert records["captions"][:] == [[row["text"]] for row in found]
    page.locator("#undo").click()
    assert button.is_disabled()
    assert caption(page, "2.png").input_value() == "a blue spear"


def test_a_picture_without_a_caption_is_not_saved(page):
    caption(page, "1.png").fill("  ")
    page.locator("#save").click()
    assert page.locator("#saved").text_content() == "1.png has no caption. Write one, or leave the picture out."
    assert caption(page, "1.png").evaluate("area => !area.checkValidity()")


def test_pictures_are_found(page):
    page.locator("#search").fill("red w")
    assert names(page) == ["5.png"]
    page.locator("#search").fill("")
    page.locator("#order").select_option("short")
    assert names(page)[:2] == ["4.png", "1.png"]
    page.locator("#order").select_option("")
    page.locator(".kind", has_text="a caption that is too long").click()
    assert names(page) == ["2.png"]
    assert page.locator("#shown").text_content() == "1 of 7 pictures"
    page.locator("#finding").select_option("edited")
    assert names(page) == []
    page.locator("#finding").select_option("")
    assert len(names(page)) == 7


def test_the_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type("spear")
    assert names(page) == ["2.png", "3.png"]
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.type("!")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.type("?")
    assert [caption(page, name).input_value() for name in ("2.png", "3.png")] == [
        "a blue spear?",
        'a green spear, "long"!',
    ]
    page.keyboard.press("Escape")
    assert caption(page, "2.png").input_value() == "a blue spear"
    found, _ = saved(page, lambda: page.keyboard.press("Control+s"))
    assert [row["text"] for row in found] == [*CAPTIONS[:3], CAPTIONS[3] + "!", *CAPTIONS[4:]]


def test_it_fits_the_screen_and_shows_the_crop(page):
    assert page.evaluate("document.documentElement.scrollWidth") == DEVICES[page.device]["viewport"]["width"]
    image, crop = (page.locator(name).first.bounding_box() for name in (".frame img", ".crop"))
    assert crop["width"] / image["width"] == pytest.approx(32 / 60, abs=0.02)
    assert crop["x"] - image["x"] == pytest.approx((image["width"] - crop["width"]) / 2, abs=2)
    assert crop["height"] == pytest.approx(image["height"], abs=1)


def test_two_thousand_pictures_open_in_three_seconds(tmp_path, open_page):
    folder = tmp_path / "set"
    folder.mkdir()
    noise = [Image.effect_noise((200, 150), 20 + n).convert("RGB") for n in range(50)]
    for number in range(2000):
        image = noise[number % 50].copy()
        image.putpixel((0, 0), (number % 256, number // 256, 0))
        image.save(folder / f"{number:04d}.jpg", quality=60)
        (folder / f"{number:04d}.txt").write_text(f"picture {number}")
    path = write_page(folder, tmp_path / "dataset.html")
    assert 2e6 < path.stat().st_size < 5e7
    took = []
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        page = open_page(path)
        page.locator(".picture img").first.wait_for()
        took.append(time.perf_counter() - start)
    assert min(took) < 3
    page.locator("#search").fill("picture 1999")
    assert names(page) == ["1999.jpg"]
    page.locator("#search").fill("")
    for _ in range(3):
        count = page.locator(".picture").count()
        page.locator("#end").evaluate("element => element.scrollIntoView()")
        wait_for(page, "more cards", f"document.querySelectorAll('.picture').length > {count}")

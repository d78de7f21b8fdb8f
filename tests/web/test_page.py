"""The page in a real browser, with a real server and model: mouse, keyboard and touch."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from linearsr import Upscaler, weights
from linearsr.config import ModelConfig, Options
from linearsr.imaging.files import encode, read, to_pil
from linearsr.web.service import Events, Limits, NotReady, Progress, UpscaleRequest
from tests.helpers.experts import random_experts
from tests.helpers.local_service import PATIENCE, Local, served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    if os.environ.get("CI"):
        pytest.fail("Chromium is not installed, and CI does not skip the tests of the page")
    pytest.skip("Chromium is not on the path", allow_module_level=True)

expect = playwright.expect
expect.set_options(timeout=1000 * PATIENCE)
Page = playwright.Page
Browser = playwright.Browser

# Text below this contrast fails WCAG 2.2 AA.
AA = 4.5
TIMES = "\N{MULTIPLICATION SIGN}"
# Count the object URLs that were created and not revoked.
COUNT_ADDRESSES = """
window.addresses = new Set();
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (blob) => {
  const url = createObjectURL(blob);
  addresses.add(url);
  return url;
};
URL.revokeObjectURL = (url) => { addresses.delete(url); revokeObjectURL(url); };
"""
# Return the lowest contrast of any visible text, and that text.
LEAST_CONTRAST = """
() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3)
    .map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) =>
    e.checkVisibility({ opacityProperty: true }) && !e.closest(":disabled, [aria-hidden]") &&
    ([...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.matches("input")));
  const found = texts.map((e) => {
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)];
  });
  return found.sort(([a], [b]) => a - b)[0];
}
"""
# Collect every status text of the page, even one shown for a moment only.
COLLECT_STATUS = """
() => {
  window.said = [];
  const note = (records) => {
    for (const { addedNodes } of records) for (const node of addedNodes) said.push(node.data);
  };
  new MutationObserver(note).observe(document.getElementById("status"), { childList: true });
}
"""
READ_EVENTS = """
async ([bytes, size]) => {
  const { events } = await import("/page/stream.js");
  const body = new ReadableStream({
    start(controller) {
      for (let i = 0; i < bytes.length; i += size) {
        controller.enqueue(new Uint8Array(bytes.slice(i, i + size)));
      }
      controller.close();
    },
  });
  const found = [];
  for await (const event of events(body)) found.push(event);
  return found;
}
"""
DECODE = """
async (base64) => {
  const { bytesOf } = await import("/page/stream.js");
  const bytes = await new Blob(bytesOf(base64)).arrayBuffer();
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
"""
# Return how many pixels of a picture lie above the frame.
HIDDEN_ABOVE = """
(picture) => picture.closest("figure").getBoundingClientRect().top -
  picture.getBoundingClientRect().top
"""
HAND_OVER = """
([how, files]) => {
  const transfer = new DataTransfer();
  for (const [name, base64] of files) {
    const data = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    transfer.items.add(new File([data], name));
  }
  const event = how === "paste"
    ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Per module, not per session: while Playwright runs, asyncio cannot be used in this thread.
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """An open page, its console errors and its requests."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(1000 * PATIENCE)
        page.add_init_script(COUNT_ADDRESSES)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        # The browser learns of the first listener with a delay: add one before any key is pressed.
        page.on("filechooser", lambda _: None)
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.goto(url)
        expect(page.locator("#model")).not_to_be_empty()

    def _console(self, message: playwright.ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


Open = Callable[..., Page]


@pytest.fixture
def visits() -> list[Visit]:
    return []


@pytest.fixture
def open_page(browser: Browser, visits: list[Visit]) -> Iterator[Open]:
    """Open a page. Afterwards its console may contain only the refusals that were named."""
    refused: list[int] = []
    contexts = []

    def opened(url: str, refusals: tuple[int, ...] = (), **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        refused.extend(refusals)
        visits.append(Visit(context.new_page(), url))
        return visits[-1].page

    yield opened
    for context in contexts:
        context.close()
    complaints = [text for visit in visits for text in visit.complaints]
    expected = [f"the server responded with a status of {status} " for status in refused]
    assert len(complaints) == len(expected), complaints
    assert all(words in text for words, text in zip(expected, complaints, strict=True)), complaints
    for visit in visits:
        # Object URLs have no host.
        assert visit.hosts <= {urlsplit(visit.url).netloc, ""}


@pytest.fixture
def url(service: Local) -> Iterator[str]:
    with served(service) as url:
        yield url


@pytest.fixture(scope="module")
def photo(photograph: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "Eileen Collins.png"
    photograph.save(path)
    return path


def choose(page: Page, path: Path) -> None:
    """Choose a photo with the mouse."""
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose a photo").click()
    chooser.value.set_files(path)
    expect(page.get_by_text(path.name, exact=True)).to_be_visible()


def start(page: Page) -> None:
    page.get_by_role("button", name="Upscale").click()


def download(page: Page) -> tuple[str, bytes]:
    """Download the result with the mouse; return the suggested name and the bytes."""
    link = page.get_by_role("link", name="Download")
    expect(link).to_be_visible()
    with page.expect_download() as saving:
        link.click()
    return saving.value.suggested_filename, Path(saving.value.path()).read_bytes()


def assert_same_picture(data: bytes, upscaler: Upscaler, photo: Path, **options: object) -> None:
    """Assert that the pixels are those of `upscaler`."""
    expected = to_pil(upscaler.upscale(read(photo.read_bytes()), Options.parse(**options)))
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def expert(page: Page, name: str) -> playwright.Locator:
    return page.get_by_role("list", name="Experts").get_by_role("listitem").filter(has_text=name)


def alert(page: Page) -> playwright.Locator:
    """Return the problems that are shown anywhere."""
    return page.get_by_role("alert").filter(has_text=".")


def drawn_width(page: Page, name: str) -> int:
    """Return the number of pixels that the browser decoded; 0 if it could not."""
    return int(page.get_by_alt_text(name).evaluate("image => image.naturalWidth"))


def test_mouse_alone_gets_from_photo_to_file(
    open_page: Open, url: str, small: Upscaler, photo: Path
) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_text(f"2{TIMES}", exact=True).click()
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Colour fix").select_option("AdaIN")
    expect(page.get_by_text(f"64 {TIMES} 48 → 128 {TIMES} 96")).to_be_visible()
    start(page)
    name, data = download(page)
    assert name == "Eileen Collins-128x96.png"
    assert_same_picture(data, small, photo, scale=2, steps=3, seed=7, colour_fix="adain")
    assert drawn_width(page, "Before") == 64 and drawn_width(page, "After") == 128
    expect(page.get_by_role("status").filter(has_text="Done")).to_contain_text("3 steps and seed 7")
    for took_part in ("structure", "texture"):
        expect(expert(page, took_part)).to_contain_text(re.compile(r"\d m?s"))
    # With three steps, these experts have none to take.
    for idle in ("refinement", "polish"):
        expect(expert(page, idle)).to_contain_text("no steps")


def test_any_scale_and_partial_detail_are_sent(
    open_page: Open, scaling_bundle: Path, photo: Path
) -> None:
    upscaler = Upscaler.load(scaling_bundle, "cpu")
    with served(Local(upscaler)) as url:
        page = open_page(url)
        choose(page, photo)
        page.get_by_label("Any scale").fill("1.7")
        page.get_by_label("Detail").fill("0.3")
        expect(page.get_by_role("radio", name=f"4{TIMES}")).not_to_be_checked()
        expect(page.get_by_text(f"64 {TIMES} 48 → 109 {TIMES} 82")).to_be_visible()
        start(page)
        _, data = download(page)
        assert_same_picture(data, upscaler, photo, scale=1.7, detail=0.3)
        expect(page.get_by_text("resampled")).to_be_hidden()
        page.get_by_text(f"1.5{TIMES}", exact=True).click()
        expect(page.get_by_label("Any scale")).to_have_value("1.5")
        page.get_by_label("Any scale").fill("4.1")
        start_again = page.get_by_role("button", name="Upscale again")
        start_again.click()
        expect(alert(page)).to_have_text("Enter a number from 1 to 4.")


def test_resampled_result_is_reported(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_text(f"2{TIMES}", exact=True).click()
    start(page)
    expect(page.get_by_role("status").filter(has_text="Done")).to_contain_text(
        f"The model worked at 4{TIMES}; its result was resampled."
    )


def test_keyboard_alone_gets_from_photo_to_file(
    open_page: Open, url: str, small: Upscaler, photo: Path, tmp_path: Path
) -> None:
    page = open_page(url)

    def tab_to(control: playwright.Locator) -> None:
        for _ in range(15):
            page.keyboard.press("Tab")
            if control.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"{control} cannot be reached")

    tab_to(page.get_by_label("Choose a photo"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photo)
    # The focused element is hidden now; the next one has the focus.
    expect(page.get_by_role("button", name="Upscale")).to_be_focused()
    tab_to(page.get_by_label(f"4{TIMES}"))
    page.keyboard.press("ArrowLeft")
    tab_to(page.get_by_label("Steps"))
    page.keyboard.press("ArrowDown")
    tab_to(page.get_by_label("Seed"))
    page.keyboard.press("Control+A")
    page.keyboard.type("11")
    page.keyboard.press("Enter")
    slider = page.get_by_role("slider", name="Before and after")
    expect(slider).to_be_visible()
    tab_to(slider)
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("51")
    tab_to(page.get_by_role("link", name="Download"))
    with page.expect_download() as saving:
        page.keyboard.press("Enter")
    data = Path(saving.value.path()).read_bytes()
    assert_same_picture(data, small, photo, scale=3, steps=3, seed=11)


def test_focus_follows_the_request(open_page: Open, url: str, service: Local, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    with service.held():
        page.get_by_role("button", name="Upscale").press("Enter")
        expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    expect(page.get_by_role("slider", name="Before and after")).to_be_focused()


def test_slider_moves_by_arrows_mouse_and_touch(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url, has_touch=True)
    choose(page, photo)
    start(page)
    slider = page.get_by_role("slider", name="Before and after")
    expect(slider).to_have_value("50")
    slider.focus()
    for key, value in [("ArrowLeft", 49), ("PageUp", 59), ("Home", 0), ("End", 100)]:
        page.keyboard.press(key)
        expect(slider).to_have_value(str(value))
        label = f"{value}% before, {100 - value}% after"
        assert slider.get_attribute("aria-valuetext") == label
        # The upper photo is clipped to the right of the line.
        shown = page.get_by_alt_text("Before").locator("..")
        expect(shown).to_have_css("clip-path", f"inset(0px {100 - value}% 0px 0px)")
    box = page.locator("figure").bounding_box()
    assert box is not None

    def at(share: float) -> tuple[float, float]:
        return box["x"] + share * box["width"], box["y"] + box["height"] / 2

    page.touchscreen.tap(*at(0.25))
    expect(slider).to_have_value("25")
    page.mouse.move(*at(0.25))
    page.mouse.down()
    page.mouse.move(*at(0.75))
    page.mouse.up()
    expect(slider).to_have_value("75")


def test_actual_size_shows_both_photos_at_the_same_spot(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url, viewport={"width": 360, "height": 300})
    choose(page, photo)
    start(page)
    zoom = page.get_by_role("button", name="Actual size")
    expect(zoom).to_be_visible()
    zoom.click()
    assert zoom.get_attribute("aria-pressed") == "true"
    before, after = page.get_by_alt_text("Before"), page.get_by_alt_text("After")
    pan = page.get_by_role("group", name="Photo at actual size")

    def hidden_above(picture: playwright.Locator) -> float:
        return float(picture.evaluate(HIDDEN_ABOVE))

    assert after.bounding_box()["width"] == 256
    assert hidden_above(before) == hidden_above(after) == (192 - pan.bounding_box()["height"]) / 2
    pan.press("End")
    page.wait_for_function("() => pan.scrollTop === pan.scrollHeight - pan.clientHeight")
    page.wait_for_function(f"() => ({HIDDEN_ABOVE})(after) === pan.scrollTop")
    assert hidden_above(before) == hidden_above(after) > 0
    zoom.click()
    assert after.bounding_box()["width"] < 256
    expect(pan).to_be_hidden()


def test_progress_names_the_expert(open_page: Open, url: str, service: Local, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    with service.held():
        start(page)
        status = page.get_by_role("status").filter(has_text="%")
        expect(status).to_have_text("0%, 0 of 4 steps: structure is running.")
        expect(page.get_by_role("list", name="Experts").get_by_role("listitem")).to_have_text(
            ["structurerunning", "refinementwaiting", "texturewaiting", "polishwaiting"]
        )
        expect(page.get_by_role("progressbar", name="Progress")).to_have_attribute("value", "0")
    expect(page.get_by_role("link", name="Download")).to_be_visible()


def test_progress_is_reported_step_by_step(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    page.evaluate(COLLECT_STATUS)
    start(page)
    expect(page.get_by_text("Done in")).to_be_visible()
    *messages, done = page.evaluate("said")
    assert messages == [
        "Sent. Waiting for its turn.",
        "0%, 0 of 4 steps: structure is running.",
        "25%, 1 of 4 steps: refinement is running.",
        "50%, 2 of 4 steps: texture is running.",
        "100%, 4 of 4 steps: writing the file.",
    ]
    assert done.endswith("with 4 steps and seed 0.")


class Scripted(Local):
    """A service that yields these events and no result."""

    events: tuple[Progress, ...] = ()

    async def upscale(self, request: UpscaleRequest) -> Events:
        for event in self.events:
            yield event
        raise NotReady("an expert was lost")


def test_progress_may_skip_experts_and_start_over(
    open_page: Open, small: Upscaler, photo: Path
) -> None:
    service = Scripted(small)
    service.events = (
        Progress("structure", 0, 2),
        Progress("structure", 1, 2),
        Progress("texture", 1, 2),
        Progress("structure", 0, 2),
        Progress("structure", 1, 2),
        Progress("texture", 2, 2),
    )
    with served(service) as url:
        page = open_page(url)
        choose(page, photo)
        page.evaluate(COLLECT_STATUS)
        start(page)
        expect(alert(page)).to_have_text("An expert was lost.")
        assert page.evaluate("said")[1:] == [
            "0%, 0 of 2 steps: structure is running.",
            "50%, 1 of 2 steps: refinement is running.",
            "50%, 1 of 2 steps: texture is running.",
            "0%, 0 of 2 steps: structure is running.",
            "50%, 1 of 2 steps: refinement is running.",
            "100%, 2 of 2 steps: writing the file.",
        ]
        # The list of experts is hidden again.
        assert page.get_by_role("listitem", include_hidden=True).all_text_contents() == [
            "structuredone",
            "refinementno steps",
            "texturedone",
            "polishno steps",
        ]


def test_events_are_parsed_wherever_they_are_cut(open_page: Open, url: str) -> None:
    """Networks may cut inside of a character, a line end or a field."""
    sent = b': ping\r\n\r\nevent: a\r\ndata: {"b":\r\ndata: "\xc3\xa9"}\r\n\r\ndata: 1\n\nid: 7\n\n'
    page = open_page(url)
    for size in (1, 2, 3, len(sent)):
        assert page.evaluate(READ_EVENTS, [list(sent), size]) == [["a", {"b": "é"}], ["message", 1]]


def test_long_result_is_decoded_in_slices(open_page: Open, url: str) -> None:
    data = bytes(range(256)) * 12_345
    page = open_page(url)
    assert (
        page.evaluate(DECODE, base64.b64encode(data).decode()) == hashlib.sha256(data).hexdigest()
    )


def test_cancel_button_cancels_the_request(
    open_page: Open, url: str, service: Local, small: Upscaler, photo: Path
) -> None:
    page = open_page(url)
    choose(page, photo)
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("status").filter(has_text="Cancelled")).to_be_visible()
        expect(page.get_by_role("list", name="Experts")).to_be_hidden()
    service.wait_for(service.slots)
    start(page)
    assert_same_picture(download(page)[1], small, photo)


def test_another_photo_cancels_the_request(
    open_page: Open, url: str, service: Local, small: Upscaler, photo: Path, tmp_path: Path
) -> None:
    page = open_page(url)
    choose(page, photo)
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        other = tmp_path / "other.png"
        with Image.open(photo) as image:
            image.crop((0, 0, 20, 30)).save(other)
        hand_over(page, "drop", other)
        expect(page.get_by_text("other.png", exact=True)).to_be_visible()
    service.wait_for(service.slots)
    start(page)
    name, data = download(page)
    assert name == "other-80x120.png"
    assert_same_picture(data, small, other)


def hand_over(page: Page, how: str, *paths: Path) -> None:
    """Drop or paste files."""
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
    page.evaluate(HAND_OVER, [how, files])


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_photo_can_be_dropped_or_pasted(open_page: Open, url: str, photo: Path, how: str) -> None:
    page = open_page(url)
    hand_over(page, how, photo, photo)
    expect(page.get_by_text(f"64 {TIMES} 48 → 256 {TIMES} 192")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="One photo at a time")).to_be_visible()
    start(page)
    assert Image.open(io.BytesIO(download(page)[1])).size == (256, 192)


def test_object_urls_are_revoked(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    for _ in range(2):
        start(page)
        expect(page.get_by_role("button", name="Upscale again")).to_be_visible()
        # One for the photo and one for the result.
        assert page.evaluate("addresses.size") == 2
    hand_over(page, "drop", photo)
    expect(page.get_by_role("link", name="Download")).to_be_hidden()
    assert page.evaluate("addresses.size") == 1


def test_tiff_is_upscaled_without_a_preview(
    open_page: Open, url: str, small: Upscaler, photo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scan.tif"
    with Image.open(photo) as image:
        image.save(path)
    page = open_page(url)
    choose(page, path)
    expect(page.get_by_text("This browser cannot show scan.tif.")).to_be_visible()
    start(page)
    name, data = download(page)
    assert name == "scan-256x192.tif"
    assert_same_picture(data, small, path)
    expect(page.get_by_text("cannot show the result; download it")).to_be_visible()
    page.get_by_label("File format").select_option("PNG")
    start(page)
    expect(page.get_by_alt_text("After")).to_be_visible()
    assert drawn_width(page, "After") == 256
    expect(page.get_by_role("slider", name="Before and after")).to_be_hidden()


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_chosen_format_is_downloaded(
    open_page: Open, url: str, small: Upscaler, photo: Path, format: str
) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_label("File format").select_option(format)
    start(page)
    name, data = download(page)
    assert name == f"Eileen Collins-256x192.{format}"
    large = small.upscale(read(photo.read_bytes()))
    expected = encode(large, {"jpg": "jpeg", "webp": "webp"}[format])
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(expected)) as same:
        assert np.array_equal(np.asarray(image), np.asarray(same))


# Problems


def test_file_that_is_no_picture_is_refused(
    open_page: Open, url: str, photo: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a photo")
    page = open_page(url, refusals=(415,))
    choose(page, notes)
    start(page)
    expect(alert(page)).to_have_text(
        "Not a picture this program reads; give PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP."
    )
    # A better photo works.
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Another photo").click()
    chooser.value.set_files(photo)
    expect(alert(page)).to_have_count(0)
    start(page)
    expect(page.get_by_role("link", name="Download")).to_be_visible()


def test_damaged_picture_is_refused(open_page: Open, url: str, photo: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(photo.read_bytes()[:2000])
    page = open_page(url, refusals=(400,))
    hand_over(page, "drop", half)
    start(page)
    expect(alert(page)).to_contain_text("Damaged or truncated")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            Limits(pixels=3000),
            f"This photo has 64 {TIMES} 48 pixels, more than the limit of 0.003 mega",
        ),
        (Limits(bytes=1000), "more than the limit of 1 kB"),
    ],
)
def test_photo_over_a_limit_is_reported_at_once(
    open_page: Open, service: Local, photo: Path, limits: Limits, words: str
) -> None:
    with served(service, limits) as url:
        page = open_page(url, refusals=(413,))
        choose(page, photo)
        expect(alert(page)).to_contain_text(words)
        start(page)
        # The message comes from the server, and is shown in the same place.
        expect(alert(page)).to_contain_text("more than the limit of")


def test_result_over_a_limit_is_refused(open_page: Open, service: Local, photo: Path) -> None:
    with served(service, Limits(output_pixels=20_000)) as url:
        page = open_page(url, refusals=(413,))
        choose(page, photo)
        start(page)
        expect(alert(page)).to_contain_text("The result has 256x192 pixels")
        page.get_by_text(f"2{TIMES}", exact=True).click()
        start(page)
        assert download(page)[0] == "Eileen Collins-128x96.png"


def test_wrong_field_has_its_message_beside_it(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_label("Steps").fill("99")
    page.get_by_label("Seed").fill("-1")
    start(page)
    steps, seed = page.get_by_label("Steps"), page.get_by_label("Seed")
    expect(steps).to_be_focused()
    expect(steps).to_have_accessible_description(
        "Enter a whole number from 1 to 50. "
        "1 is closest to the truth; more steps are sharper but invent texture."
    )
    expect(seed).to_have_attribute("aria-invalid", "true")
    steps.fill("1")
    seed.fill("0")
    steps.press("Enter")
    expect(page.get_by_text("Done in")).to_be_visible()
    expect(seed).not_to_have_attribute("aria-invalid", "true")


def test_field_refused_by_the_server_has_its_message_beside_it(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url, refusals=(422,))
    choose(page, photo)
    page.get_by_label("Seed").fill("9" * 19)
    start(page)
    expect(page.get_by_label("Seed")).to_be_focused()
    expect(page.get_by_label("Seed")).to_have_accessible_description(
        "Must be below 9223372036854775808, not '9999999999999999999'. "
        "The same seed gives the same result."
    )


def test_busy_server_is_reported(open_page: Open, small: Upscaler, photo: Path) -> None:
    with served(Local(small, slots=0)) as url:
        page = open_page(url, refusals=(429,))
        choose(page, photo)
        start(page)
        expect(alert(page)).to_have_text("The server is busy; try again in 2 s.")
        expect(page.get_by_role("button", name="Upscale")).to_be_enabled()


def test_lost_server_is_reported(
    open_page: Open, service: Local, photo: Path, visits: list[Visit]
) -> None:
    with served(service) as url:
        page = open_page(url)
        choose(page, photo)
        expect(page.get_by_text("small", exact=True)).to_be_visible()
    start(page)
    expect(alert(page)).to_have_text(
        "The server does not answer; check the connection and try again."
    )
    # The message comes from the browser, not from the page.
    assert visits[0].complaints.pop() == "Failed to load resource: net::ERR_CONNECTION_REFUSED"


def test_failure_during_a_request_is_reported(
    open_page: Open, url: str, service: Local, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no part of this is for clients")

    page = open_page(url)
    choose(page, photo)
    monkeypatch.setattr(service.upscaler, "finish", fails)
    start(page)
    expect(alert(page)).to_contain_text("The server failed")
    monkeypatch.undo()
    start(page)
    expect(page.get_by_role("link", name="Download")).to_be_visible()


def test_token_is_required_and_kept(open_page: Open, service: Local, photo: Path) -> None:
    with served(service, token="open sesame") as url:
        page = open_page(url, refusals=(401,))
        choose(page, photo)
        token = page.get_by_label("Access token")
        start(page)
        expect(alert(page)).to_have_text("This server requires an access token.")
        expect(token).to_be_focused()
        token.fill("wrong")
        token.press("Enter")
        expect(alert(page)).to_have_text("The access token is missing or wrong.")
        expect(token).to_be_focused()
        token.fill("open sesame")
        token.press("Enter")
        expect(page.get_by_role("link", name="Download")).to_be_visible()


# The model and the limits


def test_tags_are_disabled_unless_the_model_takes_them(
    open_page: Open, url: str, tagged_config: ModelConfig, photo: Path, tmp_path: Path
) -> None:
    tags = open_page(url).get_by_label("Tags")
    expect(tags).to_be_disabled()
    expect(tags).to_have_accessible_description("small takes no tags: it was trained without them.")
    experts = [m.state_dict() for m in random_experts(tagged_config, 4)]
    weights.save(tmp_path, tagged_config, experts, {"licence": "test"})
    upscaler = Upscaler.load(tmp_path, "cpu")
    with served(Local(upscaler)) as url:
        page = open_page(url)
        choose(page, photo)
        page.get_by_label("Tags").fill("woman, space suit")
        start(page)
        data = download(page)[1]
    assert_same_picture(data, upscaler, photo, tags="woman, space suit")
    with pytest.raises(AssertionError):
        assert_same_picture(data, upscaler, photo)


def test_steps_stay_within_the_limit_of_the_server(
    open_page: Open, service: Local, photo: Path
) -> None:
    with served(service, Limits(steps=8)) as url:
        page = open_page(url)
        choose(page, photo)
        expect(page.get_by_label("Steps")).to_have_value("4")
        page.get_by_label("Steps").fill("9")
        start(page)
        expect(alert(page)).to_have_text("Enter a whole number from 1 to 8.")


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_fits_and_is_legible(
    open_page: Open, url: str, service: Local, photo: Path, width: int, scheme: str
) -> None:
    page = open_page(
        url,
        refusals=(422,),
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    )

    def assert_fits_and_reads() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        photo_box, stage = page.locator("figure").bounding_box(), page.get_by_label("Photo").first
        assert photo_box is None or photo_box["width"] <= stage.bounding_box()["width"]
        contrast, text = page.evaluate(LEAST_CONTRAST)
        assert contrast >= AA, text

    assert_fits_and_reads()
    choose(page, photo)
    assert_fits_and_reads()
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        assert_fits_and_reads()
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    assert_fits_and_reads()
    page.get_by_label("Seed").fill("9" * 19)
    start(page)
    expect(alert(page)).to_be_visible()
    assert_fits_and_reads()


def test_every_control_has_an_accessible_name(open_page: Open, url: str, photo: Path) -> None:
    """Screen readers can name everything that can be used or seen."""
    page = open_page(url)
    expect(page.get_by_label("Choose a photo")).to_have_accessible_description(
        "PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP, up to 20 MB and 4 megapixels"
    )
    choose(page, photo)
    start(page)
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    controls = page.locator("a, button, input, select, figure img, progress, ol, section")
    visible = [e for e in controls.all() if e.is_visible() and not e.get_attribute("aria-hidden")]
    assert len(visible) > 15
    for control in visible:
        expect(control).to_have_accessible_name(re.compile("."))
    assert page.get_by_role("group", name="Scale").get_by_role("radio").count() == 5


def test_page_has_no_inline_script_or_style(url: str, open_page: Open) -> None:
    """The content security policy of the page would block inline code."""
    page = open_page(url)
    assert page.locator("[style], style, script:not([src]), [onclick]").count() == 0

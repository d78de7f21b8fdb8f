"""The page in real browsers, with a real server and model: mouse, keyboard and touch.

Playwright brings patched browsers of its own. These tests use those of the system instead:
Chromium, and Firefox over WebDriver BiDi.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import re
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from linearsr import Upscaler, weights
from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.imaging.files import encode, read, to_pil
from linearsr.web.service import Events, Limits, NotReady, Progress, Result, UpscaleRequest
from tests.helpers.experts import random_experts
from tests.helpers.firefox import write_launcher
from tests.helpers.forms import saved
from tests.helpers.local_service import PATIENCE, Local, served

Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = {
    "chromium": shutil.which("chromium"),
    "firefox": shutil.which("firefox-esr") or shutil.which("firefox"),
}

# Tests of what browsers do differently; the others are thorough in Firefox (tests/conftest.py).
every_browser = pytest.mark.every_browser

expect = playwright.expect
expect.set_options(timeout=1000 * PATIENCE)
Page = playwright.Page
Browser = playwright.Browser

# The folder in which a Firefox saves files.
DOWNLOADS: dict[Browser, Path] = {}
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
# The addresses of questions how long a photo will take.
ESTIMATE = "**/v1/estimate?*"
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
COUNT_INLINE = """
(html) => new DOMParser().parseFromString(html, "text/html")
  .querySelectorAll("[style], style, script:not([src]), [onclick]").length
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
    ? new ClipboardEvent("paste", { bubbles: true })
    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  // Firefox would drop the files that are given to the constructor.
  if (how === "paste") Object.defineProperty(event, "clipboardData", { value: transfer });
  document.body.dispatchEvent(event);
}
"""


@pytest.fixture(scope="module")
def started() -> Iterator[playwright.Playwright]:
    # Per module, not per session: while Playwright runs, asyncio cannot be used in this thread.
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module", params=BROWSERS)
def browser(
    request: pytest.FixtureRequest,
    started: playwright.Playwright,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Browser]:
    path = BROWSERS[request.param]
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{request.param} is not installed, and CI does not skip it")
        pytest.skip(f"{request.param} is not on the path")
    if request.param == "chromium":
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
    else:
        launcher = write_launcher(tmp_path_factory.mktemp("browser"), path)
        folder = tmp_path_factory.mktemp("downloads")
        browser = started.firefox.launch(
            executable_path=launcher, channel="moz-firefox", downloads_path=folder
        )
        DOWNLOADS[browser] = folder
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
Serve = Callable[..., str]


@pytest.fixture
def visits() -> list[Visit]:
    return []


@pytest.fixture(scope="session")
def experience(small: Upscaler) -> tuple[UpscaleRequest, Result]:
    """Return a request and its result.

    A server that has had no request would upscale pictures when it is first asked for an estimate,
    and those would be among the requests that tests hold and count.
    """
    image = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB")
    request = UpscaleRequest(
        saved(image, "png"), Options(), FileOptions(format="png"), pages=((64, 64),)
    )

    async def upscaled() -> Result:
        (result,) = [event async for event in Local(small).upscale(request)]
        assert isinstance(result, Result)
        return result

    # Playwright runs an event loop in the thread of the tests.
    with ThreadPoolExecutor(1) as threads:
        return request, threads.submit(asyncio.run, upscaled()).result()


@pytest.fixture
def serve(experience: tuple[UpscaleRequest, Result]) -> Iterator[Serve]:
    """Run a server until all pages are closed; return its address."""
    with ExitStack() as servers:

        def serve(service: Local, limits: Limits | None = None, token: str | None = None) -> str:
            return servers.enter_context(served(service, limits, token, learned=experience))

        yield serve


@pytest.fixture
def open_page(browser: Browser, visits: list[Visit], serve: Serve) -> Iterator[Open]:
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
    # Firefox does not report them.
    known = [] if browser.browser_type.name == "firefox" else refused
    expected = [f"the server responded with a status of {status} " for status in known]
    assert len(complaints) == len(expected), complaints
    assert all(words in text for words, text in zip(expected, complaints, strict=True)), complaints
    for visit in visits:
        # Object URLs have no host.
        assert visit.hosts <= {urlsplit(visit.url).netloc, ""}


@pytest.fixture
def url(serve: Serve, service: Local) -> str:
    return serve(service)


@pytest.fixture(scope="module")
def photo(photograph: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "Eileen Collins.png"
    photograph.save(path)
    return path


def choose(page: Page, path: Path) -> None:
    """Choose a photo with the mouse."""
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose photos", exact=True).click()
    chooser.value.set_files(path)
    expect(page.locator("#name")).to_have_text(path.name)


def open_more(page: Page) -> None:
    """Open the settings that few change."""
    page.get_by_text("More settings").click()


def put(field: playwright.Locator, value: str) -> None:
    """Type a number into a field; `fill` would append it in Firefox."""
    field.press("Control+A")
    field.press_sequentially(value)


def start(page: Page) -> None:
    page.get_by_role("button", name="Upscale").click()


def download(page: Page) -> tuple[str, bytes]:
    """Download the result with the mouse; return the suggested name and the bytes."""
    return save(page, page.get_by_role("link", name="Download"))


def save(page: Page, control: playwright.Locator) -> tuple[str, bytes]:
    """Click on a link or button that downloads; return the name of the file and its bytes."""
    expect(control).to_be_visible()
    return saved_by(page, control.click)


def is_firefox(page: Page) -> bool:
    return page.context.browser.browser_type.name == "firefox"


def saved_by(page: Page, act: Callable[[], None]) -> tuple[str, bytes]:
    """Return the name and the bytes of the file that the browser saves because of `act`."""
    if not is_firefox(page):
        with page.expect_download() as saving:
            act()
        return saving.value.suggested_filename, Path(saving.value.path()).read_bytes()
    # Firefox reports no downloads of object URLs. It writes to *.part, and then renames that.
    folder = DOWNLOADS[page.context.browser]
    act()
    for _ in range(20 * PATIENCE):
        files = list(folder.iterdir())
        if [file.stat().st_size > 0 for file in files] == [True] and files[0].suffix != ".part":
            data = files[0].read_bytes()
            files[0].unlink()
            return files[0].name, data
        page.wait_for_timeout(50)
    raise AssertionError(f"nothing was saved: {files}")


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


@every_browser
def test_mouse_alone_gets_from_photo_to_file(
    open_page: Open, url: str, small: Upscaler, photo: Path
) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_text(f"2{TIMES}", exact=True).click()
    put(page.get_by_label("Steps"), "3")
    open_more(page)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Solver").select_option("DPM")
    page.get_by_label("Colour fix").select_option("AdaIN")
    expect(page.get_by_text(f"64 {TIMES} 48 → 128 {TIMES} 96")).to_be_visible()
    start(page)
    name, data = download(page)
    assert name == "Eileen Collins-128x96.png"
    assert_same_picture(
        data, small, photo, scale=2, steps=3, seed=7, solver="dpm", colour_fix="adain"
    )
    assert drawn_width(page, "Before") == 64 and drawn_width(page, "After") == 128
    expect(page.get_by_role("status").filter(has_text="Done")).to_contain_text("3 steps and seed 7")
    for took_part in ("structure", "texture"):
        expect(expert(page, took_part)).to_contain_text(re.compile(r"\d m?s"))
    # With three steps, these experts have none to take.
    for idle in ("refinement", "polish"):
        expect(expert(page, idle)).to_contain_text("no steps")


def test_any_scale_and_partial_detail_are_sent(
    open_page: Open, serve: Serve, scaling_bundle: Path, photo: Path
) -> None:
    upscaler = Upscaler.load(scaling_bundle, "cpu")
    url = serve(Local(upscaler))
    page = open_page(url)
    choose(page, photo)
    put(page.get_by_label("Any scale"), "1.7")
    page.get_by_label("Detail").fill("0.3")
    expect(page.get_by_role("radio", name=f"4{TIMES}")).not_to_be_checked()
    expect(page.get_by_text(f"64 {TIMES} 48 → 109 {TIMES} 82")).to_be_visible()
    start(page)
    _, data = download(page)
    assert_same_picture(data, upscaler, photo, scale=1.7, detail=0.3)
    expect(page.get_by_text("resampled")).to_be_hidden()
    page.get_by_text(f"1.5{TIMES}", exact=True).click()
    expect(page.get_by_label("Any scale")).to_have_value("1.5")
    put(page.get_by_label("Any scale"), "4.1")
    start(page)
    expect(alert(page)).to_have_text("Enter a number from 1 to 4.")


def test_resampled_result_is_reported(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_text(f"2{TIMES}", exact=True).click()
    start(page)
    expect(page.get_by_role("status").filter(has_text="Done")).to_contain_text(
        f"The model worked at 4{TIMES}; its result was resampled."
    )


@every_browser
def test_keyboard_alone_gets_from_photo_to_file(
    open_page: Open, url: str, small: Upscaler, photo: Path, tmp_path: Path
) -> None:
    page = open_page(url)

    def tab_to(control: playwright.Locator, key: str = "Tab") -> None:
        for _ in range(30):
            page.keyboard.press(key)
            if control.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"{control} cannot be reached")

    tab_to(page.get_by_label("Choose photos"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photo)
    expect(page.get_by_role("button", name="Upscale")).to_be_enabled()
    # More photos can be added from the same place.
    expect(page.get_by_label("Choose photos")).to_be_focused()
    tab_to(page.get_by_label(f"4{TIMES}"))
    page.keyboard.press("ArrowLeft")
    tab_to(page.get_by_label("Steps"))
    page.keyboard.press("ArrowDown")
    tab_to(page.locator("summary"))
    page.keyboard.press("Enter")
    tab_to(page.get_by_label("Seed"))
    page.keyboard.press("Control+A")
    page.keyboard.type("11")
    page.keyboard.press("Enter")
    slider = page.get_by_role("slider", name="Before and after")
    expect(slider).to_be_visible()
    # The other way would lead through the controls of the browser.
    tab_to(slider, "Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("51")
    tab_to(page.get_by_role("link", name="Download"))
    _, data = saved_by(page, lambda: page.keyboard.press("Enter"))
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

    # Playwright gives Firefox no touch screen.
    if not is_firefox(page):
        page.touchscreen.tap(*at(0.25))
        expect(slider).to_have_value("25")
    page.mouse.move(*at(0.25))
    page.mouse.down()
    page.mouse.move(*at(0.75))
    page.mouse.up()
    expect(slider).to_have_value("75")


@every_browser
def test_zoom_shows_both_photos_at_the_same_spot(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url, viewport={"width": 360, "height": 300})
    choose(page, photo)
    start(page)
    zoom = page.get_by_role("group", name="Zoom")
    before, after = page.get_by_alt_text("Before"), page.get_by_alt_text("After")
    pan = page.get_by_role("group", name="Zoomed photo")
    expect(zoom.get_by_label("Fit")).to_be_checked()
    assert after.bounding_box()["width"] < 256

    def hidden_above(picture: playwright.Locator) -> float:
        return float(picture.evaluate(HIDDEN_ABOVE))

    for label, width in (("100%", 256), ("200%", 512)):
        zoom.get_by_text(label, exact=True).click()
        assert after.bounding_box()["width"] == before.bounding_box()["width"] == width
        # The middle stays in the middle.
        middle = (width * 3 / 4 - pan.evaluate("pan => pan.clientHeight")) / 2
        assert hidden_above(before) == hidden_above(after) == pytest.approx(middle, abs=1)
    pan.press("End")
    page.wait_for_function("() => pan.scrollTop === pan.scrollHeight - pan.clientHeight")
    # Firefox lays out in sixtieths of a pixel.
    page.wait_for_function(f"() => Math.abs(({HIDDEN_ABOVE})(after) - pan.scrollTop) < 0.1")
    assert hidden_above(before) == hidden_above(after) > 0
    slider = page.get_by_role("slider", name="Before and after")
    slider.press("1")
    assert after.bounding_box()["width"] == 256
    slider.press("0")
    expect(zoom.get_by_label("Fit")).to_be_checked()
    assert after.bounding_box()["width"] < 256
    expect(pan).to_be_hidden()


def test_progress_names_the_expert(open_page: Open, url: str, service: Local, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    with service.held():
        start(page)
        status = page.get_by_role("status").filter(has_text="steps")
        expect(status).to_have_text("0 of 4 steps: structure is running.")
        expect(page.get_by_role("list", name="Experts").get_by_role("listitem")).to_have_text(
            ["structurerunning", "refinementwaiting", "texturewaiting", "polishwaiting"]
        )
        # It moves before the first expert has ended, by the server's estimate.
        page.wait_for_function("() => progress.value > 1")
        expect(page.get_by_text(re.compile(r"^\d+% · \d+ s"))).to_be_visible()
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
        "0 of 4 steps: structure is running.",
        "1 of 4 steps: refinement is running.",
        "2 of 4 steps: texture is running.",
        "4 of 4 steps: writing the file.",
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
    open_page: Open, serve: Serve, small: Upscaler, photo: Path
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
    url = serve(service)
    page = open_page(url)
    choose(page, photo)
    page.evaluate(COLLECT_STATUS)
    start(page)
    expect(alert(page)).to_have_text("An expert was lost.")
    assert page.evaluate("said")[1:] == [
        "0 of 2 steps: structure is running.",
        "1 of 2 steps: refinement is running.",
        "1 of 2 steps: texture is running.",
        "0 of 2 steps: structure is running.",
        "1 of 2 steps: refinement is running.",
        "2 of 2 steps: writing the file.",
    ]
    # The list of experts is hidden again.
    assert page.locator("#experts li").all_text_contents() == [
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


def hand_over(page: Page, how: str, *paths: Path) -> None:
    """Drop or paste files."""
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
    page.evaluate(HAND_OVER, [how, files])


@every_browser
@pytest.mark.parametrize("how", ["drop", "paste"])
def test_photo_can_be_dropped_or_pasted(open_page: Open, url: str, photo: Path, how: str) -> None:
    page = open_page(url)
    hand_over(page, how, photo)
    expect(page.get_by_text(f"64 {TIMES} 48 → 256 {TIMES} 192")).to_be_visible()
    start(page)
    assert Image.open(io.BytesIO(download(page)[1])).size == (256, 192)


def test_focus_stays_where_it_was_when_photos_come(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    steps = page.get_by_label("Steps")
    steps.focus()
    hand_over(page, "drop", photo)
    expect(page.get_by_role("button", name="Upscale")).to_be_enabled()
    expect(steps).to_be_focused()


def test_object_urls_are_revoked(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    for _ in range(2):
        start(page)
        expect(page.get_by_role("button", name="Upscale again")).to_be_visible()
        # One for the photo and one for the result.
        assert page.evaluate("addresses.size") == 2
    hand_over(page, "drop", photo)
    # The result of the first photo is kept, but only the second one is drawn.
    expect(page.get_by_role("link", name="Download", exact=True)).to_be_hidden()
    expect(page.get_by_role("button", name="Upscale 1 photo")).to_be_enabled()
    assert page.evaluate("addresses.size") == 1
    page.get_by_role("button", name="Remove all").click()
    assert page.evaluate("addresses.size") == 0


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


def test_file_that_is_no_picture_is_not_taken(
    open_page: Open, url: str, photo: Path, tmp_path: Path
) -> None:
    script, disguised = tmp_path / "script.py", tmp_path / "disguised.png"
    for path in (script, disguised):
        path.write_text("print('not a photo')")
    heic = tmp_path / "IMG_1.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    page = open_page(url)
    offered = page.get_by_label("Choose photos").get_attribute("accept")
    assert ".py" not in offered.split(",") and "*" not in offered
    hand_over(page, "drop", script)
    expect(alert(page)).to_have_text("script.py is not a picture that can be read here.")
    expect(page.get_by_role("button", name="Upscale")).to_be_hidden()
    hand_over(page, "drop", heic)
    expect(alert(page)).to_contain_text("Export HEIC photos as JPEG first.")
    hand_over(page, "drop", photo, disguised, script)
    expect(alert(page)).to_have_text(
        "disguised.png and 1 more: not a picture that can be read here, so left out."
    )
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
            "This photo has 0.00307 megapixels, and this server takes at most 0.003 megapixels. "
            "Crop it to a part.",
        ),
        (Limits(bytes=1000), "and this server takes at most 1 kB. Crop it to a part."),
    ],
)
def test_photo_over_a_limit_cannot_be_started(
    open_page: Open, serve: Serve, service: Local, photo: Path, limits: Limits, words: str
) -> None:
    url = serve(service, limits)
    page = open_page(url)
    choose(page, photo)
    expect(alert(page)).to_contain_text(words)
    expect(page.get_by_role("button", name="Upscale")).to_be_disabled()


def test_photo_gets_the_largest_scale_that_the_limits_admit(
    open_page: Open, serve: Serve, service: Local, small: Upscaler, photo: Path
) -> None:
    url = serve(service, Limits(output_pixels=20_000))
    page = open_page(url)
    choose(page, photo)
    expect(page.get_by_text(f"so 2{TIMES} is chosen.")).to_contain_text(
        f"At 4{TIMES} the result would have 0.0492 megapixels, more than this server's limit "
        "of 0.02 megapixels"
    )
    expect(page.get_by_role("radio", name=f"2{TIMES}", exact=True)).to_be_checked()
    expect(page.get_by_role("radio", name=f"4{TIMES}")).to_be_disabled()
    expect(page.get_by_role("radio", name=f"1{TIMES}", exact=True)).to_be_enabled()
    start(page)
    name, data = download(page)
    assert name == "Eileen Collins-128x96.png"
    assert_same_picture(data, small, photo, scale=2)


def test_photo_that_takes_too_long_cannot_be_started(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url)

    def answer(route: playwright.Route) -> None:
        fits = "steps=1&" in route.request.url
        detail = "" if fits else "it would take 2 hours, more than the limit of 1 hour"
        route.fulfill(json={"seconds": 7200, "fits": fits, "detail": detail})

    page.route(ESTIMATE, answer)
    choose(page, photo)
    expect(alert(page)).to_have_text("It would take 2 hours, more than the limit of 1 hour.")
    expect(page.get_by_role("button", name="Upscale")).to_be_disabled()
    put(page.get_by_label("Steps"), "1")
    page.get_by_label("Steps").press("Tab")
    expect(page.get_by_role("button", name="Upscale")).to_be_enabled()
    expect(page.get_by_text("This will take about 2 hours on this server.")).to_be_visible()
    expect(alert(page)).to_have_count(0)


def test_time_is_estimated_before_the_start(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    expect(page.get_by_text("This will take about")).to_have_text(
        re.compile(r"^This will take about \d+ (s|minutes) on this server\.$")
    )


def set_hidden(page: Page, hidden: bool) -> None:
    """Hide or show the tab, as far as the page can tell."""
    page.evaluate(
        """(value) => {
          Object.defineProperty(document, "hidden", { value, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def test_hidden_page_asks_for_no_estimate(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    questions: list[str] = []
    page.on("request", lambda r: questions.append(r.url) if "/v1/estimate" in r.url else None)
    set_hidden(page, True)
    choose(page, photo)
    expect(page.get_by_text(f"64 {TIMES} 48 → 256 {TIMES} 192")).to_be_visible()
    page.get_by_text(f"2{TIMES}", exact=True).click()
    set_hidden(page, False)
    expect(page.get_by_text("This will take about")).to_be_visible()
    assert [re.search(r"scale=\d", question)[0] for question in questions] == ["scale=2"]


def test_estimate_is_not_waited_for_when_the_page_is_hidden(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url)
    unanswered: list[playwright.Route] = []
    page.route(ESTIMATE, lambda route: unanswered.append(route), times=1)
    with page.expect_request(ESTIMATE):
        choose(page, photo)
    set_hidden(page, True)
    # Only a page that gave up its first question asks another one, and that is answered.
    set_hidden(page, False)
    expect(page.get_by_text("This will take about")).to_be_visible()


def test_estimate_that_comes_after_the_start_moves_the_progress(
    open_page: Open, url: str, service: Local, photo: Path
) -> None:
    page = open_page(url)
    unanswered: list[playwright.Route] = []
    page.route(ESTIMATE, lambda route: unanswered.append(route))
    with page.expect_request(ESTIMATE):
        choose(page, photo)
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        assert page.evaluate("progress.value") == 0
        unanswered[0].continue_()
        page.wait_for_function("() => progress.value > 1")
    expect(page.get_by_role("link", name="Download")).to_be_visible()


# Crops


def rectangle(page: Page) -> playwright.Locator:
    return page.get_by_role("group", name="Crop")


def corner(page: Page) -> tuple[float, float]:
    box = page.locator("figure").bounding_box()
    assert box is not None
    return box["x"], box["y"]


def test_crop_has_the_pixels_of_the_photo(
    open_page: Open, serve: Serve, service: Local, small: Upscaler, photo: Path, tmp_path: Path
) -> None:
    url = serve(service, Limits(pixels=1000))
    page = open_page(url)
    choose(page, photo)
    page.get_by_role("button", name="Crop").click()
    # The figure is four times as large as the photo. Draw from (8, 4) to (40, 28).
    x, y = corner(page)
    page.mouse.move(x + 4 * 8, y + 4 * 4)
    # The rectangle in the middle is not moved: the pointer is outside of it.
    page.mouse.down()
    page.mouse.move(x + 4 * 30, y + 4 * 30)
    page.mouse.move(x + 4 * 40, y + 4 * 28)
    page.mouse.up()
    expect(page.get_by_text(f"32 {TIMES} 24 of 64 {TIMES} 48 → 128 {TIMES} 96")).to_be_visible()
    expect(page.get_by_text("EXIF")).to_be_visible()
    page.get_by_role("button", name="Use this part").click()
    expect(page.get_by_text(f"32 {TIMES} 24 → 128 {TIMES} 96")).to_be_visible()
    expect(alert(page)).to_have_count(0)
    start(page)
    name, data = download(page)
    assert name == "Eileen Collins-crop-128x96.png"
    part = tmp_path / "part.png"
    with Image.open(photo) as image:
        # A PNG may be transparent, so that its crop has alpha.
        image.crop((8, 4, 40, 28)).convert("RGBA").save(part)
    assert_same_picture(data, small, part)


@every_browser
def test_crop_is_moved_and_resized_by_mouse_and_keyboard(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url)
    choose(page, photo)
    page.get_by_role("button", name="Crop").click()
    expect(rectangle(page)).to_be_focused()
    expect(page.get_by_text(f"51 {TIMES} 38 of 64 {TIMES} 48")).to_be_visible()

    def place() -> list[float]:
        box, (x, y) = rectangle(page).bounding_box(), corner(page)
        values = (box["x"] - x, box["y"] - y, box["width"], box["height"])
        return [round(value / 4) for value in values]

    assert place() == [6, 5, 51, 38]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    assert place() == [5, 6, 50, 38]
    x, y = corner(page)
    # Drag the middle, beyond the edge of the photo.
    page.mouse.move(x + 4 * 30, y + 4 * 25)
    page.mouse.down()
    page.mouse.move(x + 4 * 60, y + 4 * 23)
    page.mouse.up()
    assert place() == [14, 4, 50, 38]
    # Drag the upper left corner.
    page.mouse.move(x + 4 * 14, y + 4 * 4)
    page.mouse.down()
    page.mouse.move(x + 4 * 24, y + 4 * 14)
    page.mouse.up()
    assert place() == [24, 14, 40, 28]
    page.keyboard.press("Escape")
    expect(page.get_by_text(f"64 {TIMES} 48 → 256 {TIMES} 192")).to_be_visible()
    page.get_by_role("button", name="Crop").click()
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("Eileen Collins-crop.png")
    page.get_by_role("button", name="Crop").click()
    page.get_by_role("button", name="Whole photo").click()
    expect(page.get_by_text(f"64 {TIMES} 48 → 256 {TIMES} 192")).to_be_visible()


def test_crop_of_a_turned_jpeg_is_upright_and_its_result_a_jpeg(
    open_page: Open, url: str, photo: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    with Image.open(photo) as image:
        image.save(turned, exif=exif, quality=95)
    page = open_page(url)
    choose(page, turned)
    expect(page.get_by_text(f"48 {TIMES} 64 → 192 {TIMES} 256")).to_be_visible()
    page.get_by_role("button", name="Crop").click()
    page.keyboard.press("Enter")
    expect(page.get_by_text(f"38 {TIMES} 51 → 152 {TIMES} 204")).to_be_visible()
    start(page)
    name, data = download(page)
    assert name == "turned-crop-152x204.jpg"
    with Image.open(io.BytesIO(data)) as result, Image.open(turned) as image:
        upright = ImageOps.exif_transpose(image).crop((5, 6, 43, 57))
        seen = np.asarray(result.resize(upright.size, Image.Resampling.BOX), np.float32)
    # A picture that was turned or moved would differ by far more.
    assert np.corrcoef(seen.ravel(), np.asarray(upright, np.float32).ravel())[0, 1] > 0.9


# Several photos


@pytest.fixture
def holiday(photo: Path, tmp_path: Path) -> list[Path]:
    """Return three photos of different sizes, in the order of their names."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    paths = []
    with Image.open(photo) as image:
        for number, width in ((1, 40), (2, 32), (10, 24)):
            paths.append(folder / f"{number}.png")
            image.crop((0, 0, width, 20)).save(paths[-1])
    return paths


def row(page: Page, name: str) -> playwright.Locator:
    return page.get_by_role("region", name="Photos").get_by_role("listitem").filter(has_text=name)


@every_browser
def test_folder_is_upscaled_and_downloaded_as_a_zip(
    open_page: Open, url: str, service: Local, small: Upscaler, holiday: list[Path]
) -> None:
    (holiday[0].parent / "notes.txt").write_text("the third one is the best")
    (holiday[0].parent / ".hidden.png").write_bytes(holiday[0].read_bytes())
    page = open_page(url)
    if is_firefox(page):
        # Playwright cannot choose a folder in it.
        hand_over(page, "drop", *sorted(holiday[0].parent.iterdir()))
    else:
        page.get_by_label("Choose a folder").set_input_files(holiday[0].parent)
    rows = page.get_by_role("region", name="Photos").get_by_role("listitem")
    expect(rows.locator("b")).to_have_text([path.name for path in holiday])
    expect(alert(page)).to_have_text("notes.txt: not a picture that can be read here, so left out.")
    expect(page.get_by_text("3 photos will take about")).to_be_visible()
    page.get_by_role("button", name="Upscale 3 photos").click()
    expect(page.get_by_text("3 of 3 photos done")).to_be_visible()
    # They came one after another.
    assert service.most == 1
    name, data = save(page, page.get_by_role("button", name="Download all"))
    assert name == "upscaled.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["1-160x80.png", "2-128x80.png", "10-96x80.png"]
        for path, entry in zip(holiday, archive.namelist(), strict=True):
            assert_same_picture(archive.read(entry), small, path)
    name, data = save(page, row(page, "2.png").get_by_role("button", name="Download 2.png"))
    assert name == "2-128x80.png"
    assert_same_picture(data, small, holiday[1])


def test_photos_are_cancelled_one_by_one(
    open_page: Open, url: str, service: Local, holiday: list[Path]
) -> None:
    page = open_page(url)
    page.get_by_label("Choose photos").set_input_files(holiday)
    with service.held():
        page.get_by_role("button", name="Upscale 3 photos").click()
        expect(page.get_by_text("1.png: 0 of 4 steps: structure is running.")).to_be_visible()
        expect(row(page, "2.png")).to_contain_text("waiting")
        page.get_by_role("button", name="Cancel 2.png").click()
        expect(row(page, "2.png")).to_contain_text("cancelled")
        page.get_by_role("button", name="Cancel 1.png").click()
        expect(page.get_by_text("10.png: 0 of 4 steps: structure is running.")).to_be_visible()
    expect(row(page, "10.png")).to_contain_text("done")
    expect(row(page, "1.png").first).to_contain_text("cancelled")
    page.get_by_role("button", name="Upscale 2 photos").click()
    expect(page.get_by_text("3 of 3 photos done")).to_be_visible()
    service.wait_for(service.slots)
    page.get_by_role("button", name="Remove 2.png").click()
    expect(page.get_by_text("2 of 2 photos done")).to_be_visible()
    expect(page.get_by_role("button", name="Remove 10.png")).to_be_focused()


def test_photo_added_during_the_work_joins_the_queue(
    open_page: Open, url: str, service: Local, holiday: list[Path]
) -> None:
    page = open_page(url)
    hand_over(page, "drop", holiday[0])
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        hand_over(page, "drop", holiday[1])
        expect(row(page, "2.png")).to_contain_text("waiting")
    expect(page.get_by_text("2 of 2 photos done")).to_be_visible()


def test_photo_that_fails_does_not_stop_the_others(
    open_page: Open, url: str, photo: Path, holiday: list[Path], tmp_path: Path
) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(photo.read_bytes()[:2000])
    page = open_page(url, refusals=(400,))
    hand_over(page, "drop", half, *holiday)
    page.get_by_role("button", name="Upscale 4 photos").click()
    expect(page.get_by_text("3 of 4 photos done")).to_be_visible()
    expect(row(page, "half.png")).to_contain_text("Damaged or truncated")
    row(page, "2.png").get_by_role("button").first.click()
    assert drawn_width(page, "Before") == 32 and drawn_width(page, "After") == 128


def test_each_photo_gets_a_scale_that_fits(
    open_page: Open, serve: Serve, service: Local, photo: Path, holiday: list[Path]
) -> None:
    url = serve(service, Limits(output_pixels=20_000, pixels=3000))
    page = open_page(url)
    hand_over(page, "drop", photo, *holiday)
    expect(row(page, photo.name)).to_contain_text("This photo has 0.00307 megapixels")
    expect(row(page, "1.png").first).to_contain_text(f"4{TIMES}")
    page.get_by_role("button", name="Upscale 3 photos").click()
    expect(page.get_by_text("3 of 4 photos done")).to_be_visible()


def test_changed_settings_upscale_all_photos_again(
    open_page: Open, url: str, holiday: list[Path]
) -> None:
    page = open_page(url)
    hand_over(page, "drop", *holiday[:2])
    page.get_by_role("button", name="Upscale 2 photos").click()
    expect(page.get_by_text("2 of 2 photos done")).to_be_visible()
    hand_over(page, "drop", holiday[2])
    expect(page.get_by_role("button", name="Upscale 1 photo")).to_be_enabled()
    page.get_by_text(f"2{TIMES}", exact=True).click()
    page.get_by_role("button", name="Upscale 3 photos").click()
    expect(page.get_by_text("3 of 3 photos done")).to_be_visible()
    expect(page.get_by_text(f"24 {TIMES} 20 → 48 {TIMES} 40")).to_be_visible()


WALK = """
async (paths) => {
  const { dropped } = await import("/page/files.js");
  const file = (name) => ({ isFile: true, name, file: (give) => give(new File(["x"], name)) });
  // A reader gives its children in several lists and then none.
  const folder = (name, children) => ({
    isDirectory: true, name,
    createReader: () => {
      const lists = [...children.map((child) => [child]), []];
      return { readEntries: (give) => give(lists.shift()) };
    },
  });
  const entry = folder("a", [
    file("1.png"),
    folder("b", [file("2.png"), file(".3.png")]),
    folder(".git", [file("4.png")]),
  ]);
  const item = { webkitGetAsEntry: () => entry };
  return (await dropped({ files: [], items: [item] })).map(({ name }) => name);
}
"""
ZIP = """
async (files) => {
  const { zip } = await import("/page/zip.js");
  const blob = await zip(files.map(([name, text]) => [name, new Blob([text])]));
  return [...new Uint8Array(await blob.arrayBuffer())];
}
"""


def test_dropped_folder_is_walked(open_page: Open, url: str) -> None:
    assert open_page(url).evaluate(WALK) == ["1.png", "2.png"]


def test_zip_keeps_names_of_all_languages_and_numbers_equal_ones(open_page: Open, url: str) -> None:
    files = [["a.png", "1"], ["A.png", "22"], ["süß 写真.jpg", "3" * 1000], ["a.png", ""]]
    data = bytes(open_page(url).evaluate(ZIP, files))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        names = ["a.png", "A (2).png", "süß 写真.jpg", "a (3).png"]
        assert archive.namelist() == names
        assert [archive.read(name).decode() for name in names] == [text for _, text in files]


# More problems


def test_wrong_field_has_its_message_beside_it(open_page: Open, url: str, photo: Path) -> None:
    page = open_page(url)
    choose(page, photo)
    put(page.get_by_label("Steps"), "99")
    open_more(page)
    page.get_by_label("Seed").fill("-1")
    # A closed part opens when one of its fields is wrong.
    open_more(page)
    start(page)
    steps, seed = page.get_by_label("Steps"), page.get_by_label("Seed")
    expect(steps).to_be_focused()
    expect(steps).to_have_accessible_description(
        "Enter a whole number from 1 to 50. "
        "1 is closest to the truth; more steps are sharper but invent texture."
    )
    expect(seed).to_have_attribute("aria-invalid", "true")
    put(steps, "1")
    seed.fill("0")
    steps.press("Enter")
    expect(page.get_by_text("Done in")).to_be_visible()
    expect(seed).not_to_have_attribute("aria-invalid", "true")


def test_field_refused_by_the_server_has_its_message_beside_it(
    open_page: Open, url: str, photo: Path
) -> None:
    page = open_page(url, refusals=(422,))
    choose(page, photo)
    open_more(page)
    page.get_by_label("Seed").fill("9" * 19)
    start(page)
    expect(page.get_by_label("Seed")).to_be_focused()
    expect(page.get_by_label("Seed")).to_have_accessible_description(
        "Must be below 9223372036854775808, not '9999999999999999999'. "
        "The same seed gives the same result."
    )


def test_busy_server_is_asked_again(
    open_page: Open, serve: Serve, small: Upscaler, photo: Path
) -> None:
    service = Local(small, slots=0)
    url = serve(service)
    page = open_page(url, refusals=(429,))
    choose(page, photo)
    start(page)
    expect(page.get_by_text("The server is busy. Trying again in 2 s.")).to_be_visible()
    service.free = service.slots = 1
    assert_same_picture(download(page)[1], small, photo)


def test_waiting_for_a_busy_server_can_be_cancelled(
    open_page: Open, serve: Serve, small: Upscaler, photo: Path
) -> None:
    url = serve(Local(small, slots=0))
    page = open_page(url, refusals=(429,))
    choose(page, photo)
    start(page)
    expect(page.get_by_text("The server is busy.")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    expect(page.get_by_role("button", name="Upscale")).to_be_enabled()


def test_lost_server_is_reported(
    open_page: Open, service: Local, photo: Path, visits: list[Visit]
) -> None:
    with served(service) as url:
        page = open_page(url)
        choose(page, photo)
        # The page asks nothing more of the server.
        expect(page.get_by_text("This will take about")).to_be_visible()
    start(page)
    expect(alert(page)).to_have_text(
        "The server does not answer; check the connection and try again."
    )
    # The message comes from the browser, not from the page.
    if not is_firefox(page):
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


def test_token_is_required_and_kept(
    open_page: Open, serve: Serve, service: Local, photo: Path
) -> None:
    url = serve(service, token="open sesame")
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
    open_page: Open, serve: Serve, url: str, tagged_config: ModelConfig, photo: Path, tmp_path: Path
) -> None:
    page = open_page(url)
    open_more(page)
    tags = page.get_by_label("Tags")
    expect(tags).to_be_disabled()
    expect(tags).to_have_accessible_description("small takes no tags: it was trained without them.")
    experts = [m.state_dict() for m in random_experts(tagged_config, 4)]
    weights.save(tmp_path, tagged_config, experts, {"licence": "test"})
    upscaler = Upscaler.load(tmp_path, "cpu")
    url = serve(Local(upscaler))
    page = open_page(url)
    choose(page, photo)
    open_more(page)
    page.get_by_label("Tags").fill("woman, space suit")
    start(page)
    data = download(page)[1]
    assert_same_picture(data, upscaler, photo, tags="woman, space suit")
    with pytest.raises(AssertionError):
        assert_same_picture(data, upscaler, photo)


def test_steps_stay_within_the_limit_of_the_server(
    open_page: Open, serve: Serve, service: Local, photo: Path
) -> None:
    url = serve(service, Limits(steps=8))
    page = open_page(url)
    choose(page, photo)
    expect(page.get_by_label("Steps")).to_have_value("4")
    put(page.get_by_label("Steps"), "9")
    start(page)
    expect(alert(page)).to_have_text("Enter a whole number from 1 to 8.")


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        pytest.param("light", (360, 740), id="light-phone"),
        pytest.param("dark", (360, 740), id="dark-phone", marks=pytest.mark.thorough),
        pytest.param("light", (1600, 900), id="light-desktop", marks=pytest.mark.thorough),
        pytest.param("dark", (1600, 900), id="dark-desktop"),
    ],
)
def test_every_state_fits_and_is_accessible(
    open_page: Open,
    url: str,
    service: Local,
    photo: Path,
    holiday: list[Path],
    size: tuple[int, int],
    scheme: str,
) -> None:
    width, height = size
    page = open_page(
        url,
        refusals=(422,),
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        reduced_motion="reduce",
    )

    def check() -> None:
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        photo_box, stage = page.locator("figure").bounding_box(), page.locator("#stage")
        assert photo_box is None or photo_box["width"] <= stage.bounding_box()["width"]
        contrast, text = page.evaluate(LEAST_CONTRAST)
        assert contrast >= AA, text
        violations = Axe().run(page).response["violations"]
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in violations] == []

    check()
    choose(page, photo)
    check()
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        check()
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    check()
    page.get_by_text("200%", exact=True).click()
    check()
    page.get_by_role("button", name="Crop").click()
    check()
    page.keyboard.press("Escape")
    open_more(page)
    page.get_by_label("Seed").fill("9" * 19)
    start(page)
    expect(alert(page)).to_be_visible()
    check()
    page.get_by_label("Seed").fill("0")
    hand_over(page, "drop", *holiday)
    # The photo that was refused is tried again.
    expect(page.get_by_role("button", name="Upscale 4 photos")).to_be_enabled()
    with service.held():
        start(page)
        expect(page.get_by_text("structure is running")).to_be_visible()
        check()
    expect(page.get_by_text("4 of 4 photos done")).to_be_visible()
    check()


def test_every_control_has_an_accessible_name(open_page: Open, url: str, photo: Path) -> None:
    """Screen readers can name everything that can be used or seen."""
    page = open_page(url)
    size, pixels = Limits().bytes, Limits().pixels
    expect(page.get_by_label("Choose photos")).to_have_accessible_description(
        f"PNG, JPEG, WebP, TIFF, AVIF, GIF, BMP or JPEG 2000, up to {size / 1e6:.0f} MB and "
        f"{pixels / 1e6:.0f} megapixels"
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
    with urllib.request.urlopen(url) as response:
        html = response.read().decode()
    assert open_page(url).evaluate(COUNT_INLINE, html) == 0

"""Take the pictures of the page that the documentation shows, from an endpoint that runs.

    linearsr serve                       # in another terminal
    python -m tools.page_pictures        # writes docs/page.png and docs/guides/page.png

It needs Chromium, and photographs that lie inside the scikit-image wheel.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import skimage.data
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
DESKTOP: ViewportSize = {"width": 1180, "height": 760}
PHONE: ViewportSize = {"width": 390, "height": 844}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
# Names of photographs, and the box that is cut out of each.
PHOTOS = {
    "cat": ("chelsea", (60, 10, 380, 230)),
    "coffee": ("coffee", (140, 40, 500, 310)),
    "rocket": ("rocket", (120, 0, 500, 285)),
    "astronaut": ("astronaut", (60, 0, 440, 285)),
}
# Milliseconds in which all four must be done.
PATIENCE = 600_000


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the endpoint")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pictures")
    parser.add_argument(
        "--all", action="store_true", help="also take the states of the page, at both sizes"
    )
    options = parser.parse_args()
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as started, tempfile.TemporaryDirectory() as folder:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        photos = _photos(Path(folder))
        (options.output / "guides").mkdir(parents=True, exist_ok=True)
        page = _page(browser, options.url, DESKTOP)
        _one(page, photos[0])
        _save(page, options.output / "page.png")
        page = _page(browser, options.url, DESKTOP)
        _several(page, photos)
        _save(page, options.output / "guides" / "page.png")
        if options.all:
            for name, size in {"desktop": DESKTOP, "phone": PHONE}.items():
                for scheme in SCHEMES:
                    _states(
                        _page(browser, options.url, size, scheme),
                        photos,
                        options.output / f"{name}-{scheme}",
                    )
        browser.close()
    return 0


def _photos(folder: Path) -> list[Path]:
    """Write the photographs at half of their size, so that there is something to gain."""
    paths = []
    for name, (source, box) in PHOTOS.items():
        photo = Image.fromarray(getattr(skimage.data, source)()).crop(box)
        paths.append(folder / f"{name}.png")
        photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS).save(
            paths[-1]
        )
    return paths


def _page(
    browser: Browser, url: str, size: ViewportSize, scheme: Literal["light", "dark"] = "light"
) -> Page:
    page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    page.goto(url)
    expect(page.locator("#model")).not_to_be_empty()
    return page


def _one(page: Page, photo: Path) -> None:
    """Upscale one photo."""
    page.get_by_label("Choose photos").set_input_files(photo)
    page.get_by_role("button", name="Upscale").click()
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    expect(page.get_by_alt_text("After")).to_be_visible()


def _several(page: Page, photos: list[Path]) -> None:
    """Upscale several photos, and stop when the third one is being upscaled."""
    page.get_by_label("Choose photos").set_input_files(photos)
    page.get_by_role("button", name=f"Upscale {len(photos)} photos").click()
    expect(page.get_by_text(f"2 of {len(photos)} photos done")).to_be_visible()


def _states(page: Page, photos: list[Path], to: Path) -> None:
    """Take every state of the page as a whole, for those who change it."""
    count = 0

    def take() -> None:
        nonlocal count
        count += 1
        page.screenshot(path=f"{to}-{count}.png", full_page=True)

    take()
    page.get_by_label("Choose photos").set_input_files(photos[0])
    expect(page.get_by_text("will take about")).to_be_visible()
    take()
    page.get_by_role("button", name="Crop").click()
    take()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Upscale").click()
    expect(page.get_by_text("is running")).to_be_visible()
    take()
    expect(page.get_by_alt_text("After")).to_be_visible()
    take()
    page.get_by_text("200%", exact=True).click()
    page.get_by_text("More settings").click()
    take()
    page.get_by_label("Choose photos").set_input_files(photos[1:])
    page.get_by_role("button", name="Upscale 3 photos").click()
    expect(page.get_by_text("2 of 4 photos done")).to_be_visible()
    take()
    expect(page.get_by_text("4 of 4 photos done")).to_be_visible()
    take()


def _save(page: Page, path: Path) -> None:
    """Write the whole page, with as many colours as keep the file small."""
    # No button shall look as it does under the mouse.
    page.mouse.move(0, 0)
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
        small.save(path, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())

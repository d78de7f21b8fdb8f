"""Upscale a photograph with one step and with four, and compare both with bicubic.

    python examples/upscale.py photo.jpg compare.png

Needs only `pip install linearsr`. Without arguments it upscales scikit-image's photograph of a cat
(`pip install 'linearsr[demo]'`).
"""

import sys

from PIL import Image, ImageOps

from linearsr import Upscaler
from linearsr.evaluation.drawing import Row, details, sheet
from linearsr.imaging.files import from_pil

LARGEST, DETAIL, PANEL = 256, 160, 400


def photograph() -> Image.Image:
    """Open the photograph, turn it upright, and shrink it so that a CPU needs only seconds."""
    if len(sys.argv) > 1:
        picture = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
    else:
        import skimage.data

        picture = Image.fromarray(skimage.data.chelsea())
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def main() -> None:
    """Load the model, upscale, and write the comparison."""
    picture = photograph()

    # The weights are in the package. A folder of trained weights works too, and so does "cuda".
    upscaler = Upscaler.load("linearsr-tiny", device="cpu")

    # One step gives the mean of all photographs that fit the small picture: faithful, but soft.
    # More steps give one of these photographs: sharp, with invented detail where the small picture
    # has none. The seed chooses which one; the same seed gives the same pixels everywhere.
    versions = {
        "bicubic": picture.resize(
            (picture.width * 4, picture.height * 4), Image.Resampling.BICUBIC
        ),
        "1 step": upscaler(picture, scale=4, steps=1),
        "4 steps, seed 0": upscaler(picture, scale=4, steps=4, seed=0),
        "4 steps, seed 1": upscaler(picture, scale=4, steps=4, seed=1),
    }

    # The two details with most contrast, cut from each version.
    rows = [Row(list(versions), [_panel(version) for version in versions.values()])]
    for top, left in details(from_pil(versions["4 steps, seed 0"]).pixels, DETAIL, 2):
        box = (left, top, left + DETAIL, top + DETAIL)
        rows.append(Row([""] * 4, [_panel(version.crop(box)) for version in versions.values()]))

    output = sys.argv[2] if len(sys.argv) > 2 else "compare.png"
    sheet(rows, PANEL).save(output)
    print(f"{output}: {picture.width}x{picture.height} pixels, four times larger")


def _panel(picture: Image.Image) -> Image.Image:
    return ImageOps.contain(picture, (PANEL, PANEL))


if __name__ == "__main__":
    main()

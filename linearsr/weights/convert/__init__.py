"""Convert other programs' weights to LinearSR's: Sana's, and releases of LinearSR-like models.

    python -m linearsr.weights.convert SOURCE... --out FOLDER

`from_diffusers` reads a folder of diffusers with its config. `from_files` reads .pth and
.safetensors files in any layout like Sana's, and recognises tensors by name, or by shape and place.
Knows nothing of training.
"""

from linearsr.weights.convert.diffusers import from_diffusers
from linearsr.weights.convert.layout import Conversion
from linearsr.weights.convert.release import Release, Unseen, from_files

__all__ = ["Conversion", "Release", "Unseen", "from_diffusers", "from_files"]

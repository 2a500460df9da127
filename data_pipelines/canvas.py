"""How large a generation is: resolution tiers × aspect ratios, and which of them fits given media.

In: a tier ("480"), an aspect ("16,9"), or the size of given media. Out: sizes (height, width). The tables are the
framework's (spec training.md §2.2; cosmos-framework, data/generator/utils.py); where diffusers chooses otherwise, the
convention says so.
"""

from __future__ import annotations

import difflib
import math

CONVENTIONS = ("framework", "diffusers")

ASPECTS = ("1,1", "4,3", "3,4", "16,9", "9,16")
SIZES = {  # tier: (height, width) in the order of ASPECTS
    "256": ((256, 256), (256, 320), (320, 256), (192, 320), (320, 192)),
    "480": ((640, 640), (544, 736), (736, 544), (480, 832), (832, 480)),
    "704": ((960, 960), (832, 1088), (1088, 832), (704, 1280), (1280, 704)),
    "720": ((960, 960), (832, 1104), (1104, 832), (720, 1280), (1280, 720)),
    "768": ((1024, 1024), (880, 1184), (1184, 880), (768, 1360), (1360, 768)),
}
TALL = ("2,3", (768, 512))  # an extra canvas of tier 480, for actions only: a view of BEHAVIOR-1K
RESOLUTIONS = tuple(SIZES)  # what a request may ask for; 768 is a tier of the image models
EDIT_LONGEST, EDIT_MULTIPLE = 512, 32  # of an edited image, unless resolution and aspect are asked for
SPATIAL = 16  # pixels per latent side


def size(resolution: str, aspect: str, frames: int = 1) -> tuple[int, int]:
    """(height, width) of a tier. Images and clips share the table; frames (1 = image) is checked only to be positive.

    ValueError, with what there is, for another tier or aspect.
    """
    if frames < 1:
        raise ValueError(f"num_frames={frames}: a generation has at least one frame.")
    resolution, aspect = str(resolution), str(aspect)
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution!r} is not a tier; the tiers are {', '.join(RESOLUTIONS)}.")
    if aspect not in ASPECTS:
        close = difflib.get_close_matches(aspect.replace(":", ","), ASPECTS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"aspect_ratio {aspect!r} is not known{hint}; it is width,height: {' '.join(ASPECTS)}.")
    return SIZES[resolution][ASPECTS.index(aspect)]


def frames_up(frames: int, factor: int = 4) -> int:
    """The next number of frames that is 1 + factor·k: the framework rounds up."""
    if frames < 1:
        raise ValueError(f"num_frames={frames}: a generation has at least one frame.")
    return -(-(frames - 1) // factor) * factor + 1


def closest_aspect(height: int, width: int) -> str:
    """The aspect nearest to a picture's, in both conventions."""
    return min(ASPECTS, key=lambda a: abs(_ratio(a) - width / height))


def named_aspect(height: int, width: int) -> str:
    """The aspect of an action canvas as the framework's captions give it: the table's name, or the reduced fraction."""
    for sizes in SIZES.values():
        if (height, width) in sizes:
            return ASPECTS[sizes.index((height, width))]
    if (height, width) == TALL[1]:
        return TALL[0]
    common = math.gcd(height, width)
    return f"{width // common},{height // common}"


def action_canvas(height: int, width: int, tier: int | str, convention: str = "framework") -> tuple[int, int]:
    """(height, width) of the canvas nearest to an observation's height/width. ValueError for an unknown tier.

    The framework has one more canvas in tier 480, (768, 512); diffusers has no tier 768. (The framework's table goes on
    to tiers that no model was trained on and whose canvases are no multiples of 16; they are not here.)
    """
    tiers = RESOLUTIONS if convention == "framework" else RESOLUTIONS[:-1]
    if str(tier) not in tiers:
        raise ValueError(f"image_size {tier} is not a tier of action canvases ({convention}: {', '.join(tiers)}).")
    sizes: tuple[tuple[int, int], ...] = SIZES[str(tier)]
    if convention == "framework" and str(tier) == "480":
        sizes = (*sizes, TALL[1])
    return min(sizes, key=lambda s: abs(s[0] / s[1] - height / width))


def edit_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image to edit: its longest side 512, then both sides floored to multiples of 32."""
    scale = EDIT_LONGEST / max(width, height)
    h, w = (int(n * scale) // EDIT_MULTIPLE * EDIT_MULTIPLE for n in (height, width))
    return max(h, EDIT_MULTIPLE), max(w, EDIT_MULTIPLE)


def latent_crop(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latents of a canvas whose content is height × width pixels: padding never enters."""
    return max(height // SPATIAL, 1), max(width // SPATIAL, 1)


def check_convention(convention: str) -> None:
    """ValueError unless the convention has a name we know."""
    if convention not in CONVENTIONS:
        raise ValueError(f"prompt convention {convention!r} is not known; use {' or '.join(CONVENTIONS)}.")


def _ratio(aspect: str) -> float:
    w, h = aspect.split(",")
    return int(w) / int(h)

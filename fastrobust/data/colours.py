"""Pillow's images in the modes that are trained on."""

from PIL import Image

DEEP = ("I", "F")  # the beginnings of Pillow's modes of more than 8 bits


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, alpha dropped; palettes become RGBA first, the way for those with transparency."""
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def plain(image: Image.Image) -> Image.Image:
    """The image in grey or RGB. Modes of more than 8 bits stay: converting them would clip, not scale."""
    if image.mode in ("L", "RGB") or image.mode.startswith(DEEP):
        return image
    return image.convert("L") if image.mode == "1" else rgb(image)

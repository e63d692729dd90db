"""Which way up a picture is: cameras store the sensor's pixels and an EXIF orientation that says how to turn them."""

from __future__ import annotations

from PIL import Image

_TAG = 0x0112
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture as people and label tools see it; itself where no orientation can be read."""
    try:
        orientation = image.getexif().get(_TAG)
    except Exception:  # a damaged EXIF block raises almost anything, and viewers show such a picture as it is stored
        return image
    method = _UPRIGHT_BY.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)

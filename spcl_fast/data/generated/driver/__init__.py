"""Streets as a driver sees them, with Cityscapes' 19 classes: drawn from random numbers, then painted like photographs."""

from .look import paint
from .make import make_scene

__all__ = ["make_scene", "paint"]

"""Streets as a driver sees them, with Cityscapes' 19 classes: drawn from random numbers, then painted like photographs."""

from .look import paint
from .make import SIZE, make_scene

__all__ = ["SIZE", "make_scene", "paint"]

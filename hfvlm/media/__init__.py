"""Reads what users have, bounded in size, and says what is wrong with what it cannot read."""

from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image, read_images

__all__ = ["MediaError", "read_image", "read_images"]

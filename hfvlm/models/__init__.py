"""The architectures, one folder each."""

ARCHITECTURES = (
    "blip",
    "align",
    "clip",
    "siglip",
    "imagebind",
    "llava",
)

"""The architectures, one folder each."""

ARCHITECTURES = (
    "blip",
    "align",
    "clip",
    "filip",
    "siglip",
    "imagebind",
    "llava",
)

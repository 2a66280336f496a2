"""The architectures, one folder each."""

ARCHITECTURES = (
    "blip",
    "clip",
    "siglip",
    "imagebind",
    "llava",
)

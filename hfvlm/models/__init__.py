"""The architectures, one folder each."""

ARCHITECTURES = (
    "clip",
    "siglip",
    "imagebind",
    "llava",
)

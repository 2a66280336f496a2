"""The architectures, one folder each."""

ARCHITECTURES = (
    "clip",
    "siglip",
    "align",
    "filip",
    "imagebind",
    "blip",
    "coca",
    "mammut",
    "llava",
    "qwen_vl",
)

"""The architectures, one folder each."""

ARCHITECTURES = (
    "clip",
    "siglip",
    "align",
    "filip",
    "imagebind",
    "languagebind",
    "flava",
    "blip",
    "coca",
    "mammut",
    "flamingo",
    "llava",
    "shikra",
    "qwen_vl",
    "video_chatgpt",
    "pg_video_llava",
)

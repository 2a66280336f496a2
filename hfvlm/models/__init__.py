"""The architectures, one folder each."""

ARCHITECTURES = (
    "clip",
    "siglip",
    "align",
    "filip",
    "wukong",
    "imagebind",
    "languagebind",
    "flava",
    "blip",
    "coca",
    "mammut",
    "flamingo",
    "blip2",
    "llava",
    "shikra",
    "qwen_vl",
    "video_chatgpt",
    "pg_video_llava",
    "pali",
    "paligemma",
)

"""The small files by which sentence-transformers, and what is built on it, know what a folder embeds.

They have its plain modules alone, so that nothing of the folder is run: the model's own `get_<modality>_features`, and
vectors of unit length. sentence-transformers reads texts, images, videos and audio.
"""

import json
from pathlib import Path
from typing import Any

MODALITIES = ("text", "image", "video", "audio")
MODULES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def write_sentence_files(folder: Path, model: Any) -> None:
    """Write them next to a model that has one vector for each source, and its processor; for others, none."""
    methods = {name: f"get_{name}_features" for name in MODALITIES if name in getattr(model, "modalities", ())}
    whole = (folder / "processor_config.json").exists() and len(methods) > 1
    if not whole or hasattr(model, "score") or not all(hasattr(model, name) for name in methods.values()):
        return
    found = {name: {"method": method, "method_output_name": "pooler_output"} for name, method in methods.items()}
    rows = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(MODULES.items())]
    files = {
        "modules.json": rows,
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": found,
            "module_output_name": "sentence_embedding",
        },
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

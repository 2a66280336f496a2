"""sentence-transformers (https://sbert.net): models that compare patches with tokens, as a `MultiVectorEncoder`.

Models with one vector for each source need no adapter: `SentenceTransformer("folder")` after `import hfvlm`.
"""

from pathlib import Path
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Module, Normalize, Transformer
from torch import Tensor

METHODS = {name: f"get_{name}_features" for name in ("text", "image")}


class Vectors(Module):
    """Gives every source a list of vectors, one where the model has one, as BLIP-2 of texts; those that are not zero
    count."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        vectors: Tensor = features["token_embeddings"]
        if vectors.ndim == 2:
            features["token_embeddings"] = vectors = vectors.unsqueeze(1)
        features["attention_mask"] = vectors.any(dim=-1).long()
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write nothing: there is nothing to keep."""


def multi_vector_encoder(folder: str | Path, **model_kwargs: Any) -> MultiVectorEncoder:
    """Load FILIP, Wukong or BLIP-2's first stage: a query's score is the mean over its vectors of their best match. In
    BLIP-2, images are the documents.

    Args:
        folder: of hfvlm's, or a Hub id.
        **model_kwargs: of the model's `from_pretrained`: `dtype`, `attn_implementation`.
    """
    known = {name: {"method": method, "method_output_name": "pooler_output"} for name, method in METHODS.items()}
    transformer = Transformer(
        str(folder), model_kwargs=model_kwargs, modality_config=known, module_output_name="token_embeddings"
    )
    modules = [transformer, Vectors(), Normalize(module_input_name="token_embeddings")]
    return MultiVectorEncoder(modules=modules, similarity_fn_name="meanmaxsim")

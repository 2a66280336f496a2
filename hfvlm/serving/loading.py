"""Loading what is served: an index with its model, or a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from hfvlm.inference.adapters import load_model, model_class, processor_of
from hfvlm.inference.embed import SETTINGS, read_captions, read_embedder, read_settings, read_vectors
from hfvlm.inference.placement import check_dtype, find_device
from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.serving.conversations import Conversations
from hfvlm.serving.served import Served, Table
from hfvlm.serving.sharing import SharedEmbedder


def load(
    folder: str | Path,
    *,
    chat: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Served:
    """Load what is served.

    Args:
        folder: one that `embed` wrote, or a model's, which embeds or chats; or a Hub id.
        chat: a model that chats, beside it.
        device: as of `Embedder.from_pretrained`.
        dtype: likewise; of an index by default the one that it was made in.
        options: of the processor, by modality: {"audio": {"sampling_rate": 16000}}.

    Raises:
        ValueError: the model neither embeds nor chats, it has no such modality, or its weights are not those that the
            index was made by.
    """
    name = Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
    served = Served(name, options=options or {})
    if (Path(folder) / SETTINGS).is_file():
        chosen = {"device": device} | ({} if dtype == "auto" else {"dtype": dtype})
        served.embedder = shared(read_embedder(folder, **chosen))
        served.tables = read_tables(folder)
    elif issubclass(model_class(str(folder)), ImageTextModel):
        served.chats = load_chat(folder, device, dtype)
    else:
        served.embedder = load_embedder(folder, device, dtype)
    if chat is not None:
        if served.chats is not None:
            raise ValueError(f"{folder}: chats itself; a second model that chats is not served.")
        served.chats = load_chat(chat, device, dtype)
    if served.embedder is not None:
        served.embedder.check(list(served.options))
    return served


def shared(embedder: Any) -> SharedEmbedder:
    """Return an Embedder as one that threads share."""
    return SharedEmbedder(embedder.model, embedder.processor)


def read_tables(folder: str | Path) -> dict[str, Table]:
    """Read the vectors of every modality of which an index has some.

    Raises:
        ValueError: it has none at all.
    """
    captions, tables, problem = read_captions(folder), dict[str, Table](), None
    for modality in read_settings(folder)["columns"]:
        try:
            tables[modality] = Table(modality, *read_vectors(folder, modality), captions)
        except ValueError as error:
            problem = error
    if problem is not None and not tables:
        raise problem
    return tables


def load_embedder(folder: str | Path, device: str, dtype: str) -> SharedEmbedder:
    """Load a model that embeds.

    Raises:
        ValueError: it does not.
    """
    kind = model_class(str(folder))
    if not hasattr(kind, "modalities"):
        raise ValueError(
            f"{folder}: {kind.__name__} neither embeds nor chats. `hfvlm serve` takes a folder of `hfvlm embed`, a "
            "model of images and texts, as CLIP, or one that chats, as LLaVA."
        )
    return SharedEmbedder.from_pretrained(folder, device=device, dtype=dtype)  # type: ignore[return-value]


def check_chats(folder: str | Path) -> Any:
    """Return the processor of a model that chats.

    Raises:
        ValueError: it does not.
    """
    kind, processor = model_class(str(folder)), processor_of(folder)
    if not issubclass(kind, ImageTextModel) or not hasattr(processor, "assemble"):
        raise ValueError(f"{folder}: {kind.__name__} does not chat; LLaVA, Qwen-VL, Shikra and Video-ChatGPT do.")
    return processor


def load_chat(folder: str | Path, device: str, dtype: str) -> Conversations:
    """Load a model that chats.

    Raises:
        ValueError: it does not.
    """
    processor = check_chats(folder)
    model = load_model(folder, AutoModelForImageTextToText, dtype=check_dtype(dtype)).to(find_device(device))
    return Conversations(model.eval(), processor)

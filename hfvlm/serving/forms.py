"""What requests hold, and what they are answered: the description of the API."""

from typing import Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator

from hfvlm.inference.templates import SETS
from hfvlm.serving.errors import RequestError

MOST_SOURCES, MOST_HITS, MOST_LABELS, MOST_TOKENS = 16, 100, 100, 2048
LONGEST_TEXT = 10_000

Texts = list[str]
Files = list[UploadFile]


class Form(BaseModel):
    """Fields of a form; others are refused."""

    model_config = ConfigDict(extra="forbid")


class Sources(Form):
    """Texts and files, at least one."""

    text: Texts = Field([], description="Texts.")
    image: Files = Field([], description="Image files.")
    video: Files = Field([], description="Video files.")
    audio: Files = Field([], description="Audio files.")
    depth: Files = Field([], description="Depth maps.")
    thermal: Files = Field([], description="Thermal images.")
    imu: Files = Field([], description="IMU recordings.")

    @field_validator("text")
    @classmethod
    def short(cls, texts: list[str]) -> list[str]:
        """Refuse long texts.

        Raises:
            ValueError: one is too long.
        """
        if any(len(text) > LONGEST_TEXT for text in texts):
            raise ValueError(f"texts have at most {LONGEST_TEXT} characters")
        return texts

    def read(self) -> dict[str, list[str | bytes]]:
        """Return the sources by modality: texts, and the bytes of files.

        Raises:
            RequestError: there is none, or there are too many.
        """
        found: dict[str, list[str | bytes]] = {"text": list(self.text)} if self.text else {}
        for modality in [name for name in Sources.model_fields if name != "text"]:
            if files := getattr(self, modality):
                found[modality] = contents(files)
        if not found:
            raise RequestError(f"Nothing was sent: give one of the fields {', '.join(Sources.model_fields)}.")
        if (count := sum(map(len, found.values()))) > MOST_SOURCES:
            raise RequestError(f"{count} sources; at most {MOST_SOURCES} are taken: send several requests.")
        return found


class Search(Sources):
    """Sources, whose sum is searched for; a text that ends in `::0.5` has half the weight."""

    among: str | None = Field(None, description="The modality that is searched; by default image, or the first.")
    k: int = Field(12, ge=1, le=MOST_HITS, description="Number of hits.")


class Classify(Sources):
    """One source, and the names of classes."""

    label: Texts = Field(min_length=1, max_length=MOST_LABELS, description="Names of classes, each once.")
    templates: Literal[tuple(SETS)] = Field("single", description="Prompt templates.")  # type: ignore[valid-type]
    top_k: int = Field(10, ge=1, le=MOST_LABELS, description="Number of classes that are returned.")

    @field_validator("label")
    @classmethod
    def named(cls, labels: list[str]) -> list[str]:
        """Refuse long and empty names.

        Raises:
            ValueError: one is.
        """
        if any(not label.strip() or len(label) > LONGEST_TEXT for label in labels):
            raise ValueError(f"names of classes have 1 to {LONGEST_TEXT} characters")
        return labels


class Question(Form):
    """A turn of a conversation."""

    question: str = Field(min_length=1, max_length=LONGEST_TEXT, description="The question.")
    image: Files = Field([], max_length=MOST_SOURCES, description="Images that the turn is about.")
    video: Files = Field([], max_length=MOST_SOURCES, description="Videos that the turn is about.")
    conversation: str | None = Field(None, max_length=100, description="Of an earlier answer, to go on with it.")
    max_new_tokens: int = Field(256, ge=1, le=MOST_TOKENS, description="Longest answer, in tokens.")
    temperature: float = Field(0, ge=0, le=2, allow_inf_nan=False, description="Above 0, answers are drawn.")

    def media(self) -> dict[str, list[bytes]]:
        """Return the bytes of the files."""
        return {"image": contents(self.image), "video": contents(self.video)}

    def options(self) -> dict[str, Any]:
        """Return the options of `generate`."""
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


class About(BaseModel):
    """What is served."""

    name: str
    model: str | None = Field(description="The class of the model that embeds.")
    modalities: list[str] = Field(description="What it embeds.")
    indexed: dict[str, int] = Field(description="Numbers of vectors, by modality.")
    chat_model: str | None = Field(description="The class of the model that chats.")
    chat_modality: str | None = Field(description="What it chats about: image or video.")
    templates: list[str] = Field(description="Sets of prompt templates.")
    upload_bytes: int = Field(description="Size of the largest request.")
    version: str = Field(description="Of hfvlm.")


class Vectors(BaseModel):
    """Vectors of unit length, by modality: a list of numbers for each source, in order."""

    model_config = ConfigDict(extra="forbid")
    vectors: dict[str, list[list[Any]]]


class Hit(BaseModel):
    """A row of the index."""

    row: int = Field(description="Its number among those of its modality.")
    id: str = Field(description="Its id, or the path of its file.")
    score: float = Field(description="The cosine.")
    text: str | None = Field(description="Its caption.")
    kind: str | None = Field(description="What its file is: image, audio, video or array.")
    thumbnail: str | None = Field(description="Path of a small image.")
    media: str | None = Field(description="Path of the file.")


class Hits(BaseModel):
    """The rows that were found, the nearest first."""

    among: str
    hits: list[Hit]


class Class(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Classes(BaseModel):
    """Classes, the most probable first."""

    classes: list[Class]


class Problem(BaseModel):
    """What is wrong with a request, and the remedy."""

    error: str


def contents(files: Files) -> list[Any]:
    """Read uploaded files."""
    return [file.file.read() for file in files]

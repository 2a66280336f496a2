"""ViLBERT's sizes. Defaults are those of the released models: six connections between 12 layers and 6."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import BertTextConfig, HfvlmConfig, SubConfig, TowerConfig


@strict
class HfvlmViLBERTVisionConfig(TowerConfig):
    """The stream over regions.

    Args:
        feature_size: numbers that a detector gives of a region.
        hidden_dropout: on every branch, in training.
    """

    model_type = "hfvlm_vilbert_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-12
    attention_dropout: float | int = 0.1
    feature_size: int = 2048
    hidden_dropout: float | int = 0.1


@strict
class HfvlmViLBERTTextConfig(BertTextConfig):
    """The stream over words: BERT, or RoBERTa, whose positions begin at 0 here.

    Args:
        num_tasks: rows of the table of task tokens, of which one follows on [CLS]; None for no such token.
    """

    model_type = "hfvlm_vilbert_text"

    type_vocab_size: int = 2
    num_tasks: int | None = None


@strict
class HfvlmViLBERTConfig(HfvlmConfig):
    """ViLBERT. `architectures` names the class that a checkpoint is for; the others load their parts of its folder.

    Args:
        connection_size: width in which the streams attend to each other, and of the pooled outputs.
        num_connection_heads: of that attention.
        vision_connections: of each connection, the layer of the region stream that it comes before.
        text_connections: likewise, of the text stream.
        fusion: how the pooled outputs become one, "mul" or "sum".
        region_objective: what pretraining predicts of masked regions: "kl", the detector's probabilities of classes;
            "mse", the features; "nce", which of several features is theirs.
        target_size: classes of the detector, or `vision_config.feature_size` for the other two.
        num_negatives: features that "nce" draws: 70 % from other images, 30 % from the same, both rounded down.
        objective: of pretraining: 0 predicts masked words and regions also of pairs that do not belong together, 1
            does not; 2 does not predict which belong together.
        region_weight: of the loss of masked regions.
        num_answers: of VQA and Visual Genome.
        num_gqa_answers: of GQA.
        head_dropout: before the heads of the tasks, in training.
        tie_word_embeddings: words are scored by their embeddings.
    """

    model_type = "hfvlm_vilbert"
    sub_configs = {"vision_config": HfvlmViLBERTVisionConfig, "text_config": HfvlmViLBERTTextConfig}

    architectures: list[str] | None = field(default_factory=lambda: ["HfvlmViLBERTForVisionLanguageTasks"])
    vision_config: SubConfig[HfvlmViLBERTVisionConfig] = field(default_factory=HfvlmViLBERTVisionConfig)
    text_config: SubConfig[HfvlmViLBERTTextConfig] = field(default_factory=HfvlmViLBERTTextConfig)
    connection_size: int = 1024
    num_connection_heads: int = 8
    vision_connections: list[int] | tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    text_connections: list[int] | tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    fusion: str = "mul"
    region_objective: str = "kl"
    target_size: int = 1601
    num_negatives: int = 128
    objective: int = 0
    region_weight: float | int = 1.0
    num_answers: int = 3129
    num_gqa_answers: int = 1533
    head_dropout: float | int = 0.1
    tie_word_embeddings: bool = True

    def validate_connections(self) -> None:
        if len(self.vision_connections) != len(self.text_connections):
            raise ValueError("vision_connections and text_connections differ in length: a connection has one of each.")
        for name, part in (("vision_connections", self.vision_config), ("text_connections", self.text_config)):
            places = list(getattr(self, name))
            if places != sorted(places) or not all(0 <= i < part.num_hidden_layers for i in places):
                raise ValueError(
                    f"{name} {places} must rise, from 0 to the last of {part.num_hidden_layers} layers at most."
                )

    def validate_heads(self) -> None:
        if self.connection_size % self.num_connection_heads:
            raise ValueError(
                f"connection_size {self.connection_size} is not a multiple of num_connection_heads "
                f"{self.num_connection_heads}."
            )

    def validate_choices(self) -> None:
        for name, known in (("fusion", ("mul", "sum")), ("region_objective", ("kl", "mse", "nce"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.objective not in (0, 1, 2):
            raise ValueError(f"objective must be 0, 1 or 2, not {self.objective}.")
        if self.region_objective != "kl" and self.target_size != self.vision_config.feature_size:
            raise ValueError(
                f"target_size {self.target_size} must be vision_config.feature_size, {self.vision_config.feature_size}"
                f": {self.region_objective!r} predicts features."
            )

from pathlib import Path

from hfvlm.conversion import pg_video_llava as conversion

from hfvlm.key_table import Table
from hfvlm.models.pg_video_llava import (
    HfvlmPGVideoLLaVAConfig,
    HfvlmPGVideoLLaVAFeatureExtractor,
    HfvlmPGVideoLLaVAProcessor,
)
from hfvlm.models.pg_video_llava.entities import common_tags, marked, read_reply
from hfvlm.models.pg_video_llava.transcripts import spoken_text
from tests.golden import Golden
from tests.originals.video_chatgpt import composed, frames, model_outputs, prompts, training_labels


def compare(golden: Golden) -> None:
    case = golden.case
    if "templates" in case:
        prompts(golden, HfvlmPGVideoLLaVAProcessor)
    elif "sources" in case:
        training_labels(golden)
    elif "get_seq_frames" in case:
        frames(golden, HfvlmPGVideoLLaVAFeatureExtractor())
    elif "entity_matching" in case:
        words(golden)
    else:
        model_outputs(golden, conversion, HfvlmPGVideoLLaVAProcessor)


def compose(path: Path) -> tuple[HfvlmPGVideoLLaVAConfig, list[Table]]:
    """The three released files of a whole model, of which `path` is one."""
    return composed(path, "pg_video_llava/pg-video-llava-7b", conversion)


def words(golden: Golden) -> None:
    case = golden.case
    for each in case["entity_matching"]["cases"]:
        text, expected = each["text"], [tuple(piece) for piece in each["highlight_output"]]
        entities = read_reply(text, each["entity_list"], each["llm_reply"])
        pieces = [(piece, number and str(number)) for piece, number in marked(text, entities)]
        # The original forgets a single last character.
        assert expected == (pieces if expected == pieces else pieces[:-1])
        assert expected == pieces or len(pieces[-1][0]) == 1
        state = {text[entity.start : entity.end].lower(): entity.tag for entity in entities}
        # It also keeps names that the text lacks.
        assert state == {name: tag for name, tag in each["match_state"].items() if name in text.lower()}
        assert set(state.values()) <= set(each["class_list"])
    tags = case["unique_tags"]
    assert common_tags(tags["tags_in_video"]) == tags["sorted"]
    said = case["transcript"]
    assert spoken_text(said["segments"], said["audio_tags"]) == said["result"]

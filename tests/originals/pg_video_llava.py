from pathlib import Path

from hfvlm.checkpoints.key_table import Table
from hfvlm.conversion import pg_video_llava as conversion
from hfvlm.models.pg_video_llava import (
    HfvlmPGVideoLLaVAConfig,
    HfvlmPGVideoLLaVAFeatureExtractor,
    HfvlmPGVideoLLaVAProcessor,
)
from hfvlm.models.pg_video_llava.entities import common_tags, marked, read_reply
from hfvlm.models.pg_video_llava.transcripts import spoken_text
from tests.originals.video_chatgpt import check_model, composed, model_outputs, processing
from tests.support.golden import Golden


def compare(golden: Golden) -> None:
    if golden.state_dict:
        check_model(golden)
        model_outputs(golden, conversion, HfvlmPGVideoLLaVAProcessor)
    elif not processing(golden, HfvlmPGVideoLLaVAProcessor, HfvlmPGVideoLLaVAFeatureExtractor):
        golden.check()
        words(golden)


def compose(path: Path) -> tuple[HfvlmPGVideoLLaVAConfig, list[Table]]:
    """The three released files of a whole model, of which `path` is one."""
    return composed(path, "pg_video_llava", conversion)


def words(golden: Golden) -> None:
    for each in golden.section("entity_matching.cases") or []:
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
    if tags := golden.section("unique_tags"):
        assert common_tags(tags["tags_in_video"]) == tags["sorted"]
    if said := golden.section("transcript"):
        assert spoken_text(said["segments"], said["audio_tags"]) == said["result"]

"""The conversations of PG-Video-LLaVA, by the authors' names: Video-ChatGPT's and its own."""

from dataclasses import replace

from hfvlm.models.video_chatgpt.conversations import CONTENT as VIDEOS
from hfvlm.models.video_chatgpt.conversations import CONVERSATIONS as VIDEO_CHATGPT
from hfvlm.processing.conversations import Conversation

# The transcript of a video stands after it.
CONTENT = VIDEOS.removesuffix("{%- endif -%}{%- endmacro -%}") + (
    "{%- for part in content if part['type'] == 'transcript' and part['text'] -%}"
    "{{- '\nThe noisy audio transcript of this video is:\n\"' ~ part['text'] ~ '\"' -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
CONVERSATIONS: dict[str, Conversation] = {name: replace(each, content=CONTENT) for name, each in VIDEO_CHATGPT.items()}
_OLD = CONVERSATIONS["video-chatgpt_v1"]
CONVERSATIONS["pg-video-llava"] = replace(_OLD, system=_OLD.system.replace("Video-ChatGPT", "PG-Video-LLaVA"))

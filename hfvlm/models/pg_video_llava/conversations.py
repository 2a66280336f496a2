"""The conversations of PG-Video-LLaVA, by the authors' names: Video-ChatGPT's and its own."""

from dataclasses import replace

from hfvlm.models.video_chatgpt.conversations import CONVERSATIONS as VIDEO_CHATGPT
from hfvlm.models.video_chatgpt.conversations import SAID as FILMS
from hfvlm.processing.conversations import Conversation

# What is said in a film stands after it.
SAID = FILMS.removesuffix("{%- endif -%}{%- endmacro -%}") + (
    "{%- for part in content if part['type'] == 'transcript' and part['text'] -%}"
    "{{- '\nThe noisy audio transcript of this video is:\n\"' ~ part['text'] ~ '\"' -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
CONVERSATIONS: dict[str, Conversation] = {name: replace(each, said=SAID) for name, each in VIDEO_CHATGPT.items()}
_OLD = CONVERSATIONS["video-chatgpt_v1"]
CONVERSATIONS["pg-video-llava"] = replace(_OLD, system=_OLD.system.replace("Video-ChatGPT", "PG-Video-LLaVA"))

"""The conversations of Video-ChatGPT, by the authors' names."""

from hfvlm.models.llava.conversations import CONVERSATIONS as LLAVA
from hfvlm.processing.conversations import Conversation, Human, Vicuna

# Videos stand after the text of their message.
CONTENT = (
    "{%- macro text_of(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -}}"
    "{{- '\n<video>' * (content | selectattr('type', 'equalto', 'video') | list | length) -}}"
    "{%- endif -%}{%- endmacro -%}"
)
_VIDEO = (
    "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided video."
)
_OLD, _VICUNA = LLAVA["llava_v0"], LLAVA["v1"]

CONVERSATIONS: dict[str, Conversation] = {
    "video-chatgpt_v1": Vicuna(_VIDEO, _VICUNA.roles, _VICUNA.separators, content=CONTENT),
    "vicuna_v1_1": Vicuna(_VICUNA.system, _VICUNA.roles, _VICUNA.separators, content=CONTENT),
    "default": Human(_OLD.system, _OLD.roles, _OLD.separators, stop=_OLD.stop, content=CONTENT),
}

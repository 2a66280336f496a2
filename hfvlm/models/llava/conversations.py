"""The conversations that LLaVA's checkpoints were trained in, by the authors' names."""

from hfvlm.processing.conversations import Chatml, Conversation, Headed, Human, Llama2, Plain, Vicuna

_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER = "A chat between a curious user and an artificial intelligence assistant. " + _HELPFUL.format("user")
_HUMAN = "A chat between a curious human and an artificial intelligence assistant. " + _HELPFUL.format("human")
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
# The one example that Vicuna v0's conversations begin with.
_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)
_NAMES, _TALK = ("Human", "Assistant"), ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_HASHES, _SPACE_AND_END = ("###", "###"), (" ", "</s>")
_IM_END = ("<|im_end|>", "<|im_end|>")
_DIRECT = "<|im_start|>system\nAnswer the questions."

CONVERSATIONS: dict[str, Conversation] = {
    "v0": Human(_HUMAN, _NAMES, _HASHES, stop=("###",), examples=_EXAMPLE),
    "llava_v0": Human(_HUMAN, _NAMES, _HASHES, stop=("###",)),
    "v0_mmtag": Human(_TAGGED, _NAMES, _HASHES, stop=("###",), tagged=True),
    "v1": Vicuna(_USER, _TALK, _SPACE_AND_END),
    "llava_v1": Vicuna(_HUMAN, _TALK, _SPACE_AND_END),
    "v1_mmtag": Vicuna(_TAGGED, _TALK, _SPACE_AND_END, tagged=True),
    "llama_2": Llama2(_SAFE, _TALK, ("<s>", "</s>")),
    "llava_llama_2": Llama2(_VISION, _TALK, ("<s>", "</s>")),
    "mistral_instruct": Llama2("", _TALK, ("", "</s>")),
    "chatml_direct": Chatml(_DIRECT, _CHATML, _IM_END, colon="", stop=("<|im_end|>",)),
    "mpt": Chatml(_MPT, _CHATML, _IM_END, colon="", stop=("<|im_end|>",)),
    "llava_llama_3": Headed(
        _VISION,
        ("user", "assistant"),
        ("<|eot_id|>", "<|eot_id|>"),
        stop=("<|eot_id|>",),
        head=("<|start_header_id|>", "<|end_header_id|>\n\n"),
        always=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trims=True,
    ),
    "qwen_1_5": Headed(
        "You are a helpful assistant.",
        ("user", "assistant"),
        ("<|im_end|>\n", "<|im_end|>\n"),
        stop=("<|im_end|>",),
        head=("<|im_start|>", "\n"),
        always=("<|im_start|>", "<|im_end|>", "\n"),
    ),
    "plain": Plain("", ("", ""), ("\n", "\n")),
}
# Other names of the same.
CONVERSATIONS |= {
    alias: CONVERSATIONS[name]
    for alias, name in (
        ("vicuna_v1", "v1"),
        ("default", "v0"),
        ("mistral_direct", "chatml_direct"),
        ("v0_plain", "plain"),
    )
}

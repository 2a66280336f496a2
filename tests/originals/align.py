import re

import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.checkpoints import read_checkpoint
from hfvlm.checkpoints.tensor_bundle import variable_names
from hfvlm.conversion.align import block_names, config_from_original, layout_of
from hfvlm.models.align import HfvlmALIGNImageProcessor, HfvlmALIGNModel, HfvlmALIGNTokenizer
from hfvlm.models.align.modeling_align import pad_for
from tests.originals.common import bert_vocabulary, converted
from tests.support.golden import Golden, Recorder

# Those that the shapes of the weights say as well, and that is where they are read.
IN_SHAPES = ("txt_encoder_name", "embed_dim", "seq_length", "vocab_size", "temperature")
ARGUMENTS = (*IN_SHAPES, "img_encoder_name", "efficientnet", "bert_config")
EFFICIENTNET = ("width_coefficient", "depth_coefficient", "depth_divisor", "blocks_args")
BERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
SIZES = {"resize_size": "resized", "crop_size": "size", "image_size": "size"}


def compare(golden: Golden) -> None:
    if golden.state_dict:
        model_outputs(golden)
    elif "files" in golden.case:
        pixels(golden)
    else:
        tokens(golden)


def pixels(golden: Golden) -> None:
    golden.check(arguments=SIZES)
    sizes = {SIZES[name]: value for name, value in golden.section("arguments").items()}
    processor = HfvlmALIGNImageProcessor(**sizes, upright=False)
    step = golden.case.get("stride", 1)
    for name, file in golden.case["files"].items():
        values = processor(golden.folder / file, return_tensors="pt")["pixel_values"][0]
        golden.compare(name, values[:, ::step, ::step])
        exact = values.double()
        golden.compare(f"{name}.mean_std", torch.stack([exact.mean((1, 2)), exact.std((1, 2), correction=0)]))


def tokens(golden: Golden) -> None:
    golden.check(arguments=("seq_length",))
    length = {"model_max_length": golden.section("arguments").get("seq_length", 64)}
    tokenizer = HfvlmALIGNTokenizer.from_vocabulary(bert_vocabulary(golden.folder), **length)
    for row in golden.case["texts"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]


def original_weights(golden: Golden) -> dict[str, Tensor]:
    """By the names of the variables; where there is a real checkpoint, that must hold the same."""
    names = variable_names({key: golden.section("variables").get(key, key) for key in golden.state_dict})
    weights = {names[key]: tensor for key, tensor in golden.state_dict.items()}
    for index in golden.folder.glob("*.index"):
        stored = read_checkpoint(index).tensors
        assert set(stored) == set(weights)
        assert all(torch.equal(stored[name], tensor.reshape(stored[name].shape)) for name, tensor in weights.items())
    return weights


def model_outputs(golden: Golden) -> None:
    golden.check(arguments=ARGUMENTS, arguments__efficientnet=EFFICIENTNET, arguments__bert_config=BERT)
    weights = original_weights(golden)
    config = config_from_original(golden.case, weights)
    model = converted("align", weights, config, layout_of(golden.case))
    image = golden.inputs["image"].float().permute(0, 3, 1, 2) / 127.5 - 1
    text = {name: golden.inputs[name].long() for name in ("input_ids", "token_type_ids") if name in golden.inputs}
    text["attention_mask"] = golden.mask().long()
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        output = model(pixel_values=image, **text, output_hidden_states=True, return_loss=True)
        values = {name: seen[path] for name, path in paths.items()}
    hidden = output.text_model_output.hidden_states
    features = {
        "image_features": output.vision_model_output.pooler_output,
        "text_features": output.text_model_output.pooler_output,
    }
    pooler = next(name for name in weights if name.endswith("pooler/dense/kernel"))
    last = output.text_model_output.last_hidden_state
    values |= {
        "image.rescaling": image,
        "image.stem_conv_pad": pad_for(image, 3, stride=2),
        **{f"text.hidden_states.{i}": state for i, state in enumerate(hidden)},
        "text.last_hidden_state": last,
        "text.pooler_output (unused)": torch.tanh(
            last[:, 0] @ weights[pooler] + weights[pooler.replace("kernel", "bias")]
        ),
        **features,
        **{f"{name}_normalised": F.normalize(value, dim=-1) for name, value in features.items()},
        "logits_image_to_text": output.logits_per_image,
        **losses(output.logits_per_image, config.label_smoothing),
        "loss": output.loss,
    }
    for name in golden.in_order():
        value = values[name]
        golden.compare(name, stored_part(golden, name, value.permute(0, 2, 3, 1) if value.ndim == 4 else value))


def losses(logits: Tensor, smoothing: float) -> dict[str, Tensor]:
    """Each sample's; our loss is the mean of their sum."""
    target, options = torch.arange(len(logits)), {"label_smoothing": smoothing, "reduction": "none"}
    return {
        "loss_image_to_text": F.cross_entropy(logits, target, **options),
        "loss_text_to_image": F.cross_entropy(logits.t(), target, **options),
    }


def stored_part(golden: Golden, name: str, value: Tensor) -> Tensor:
    """What the meaning of an output says was kept of it."""
    meaning = golden.description(name).get("meaning", "")
    if step := re.search(r"\[:1, ::(\d+), ::\1\]", meaning):
        return value[:1, :: int(step[1]), :: int(step[1])]
    return value[:1] if "sample 0 only" in meaning else value


def module_path(name: str, model: HfvlmALIGNModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    places = {
        "expand_activation": ".expand",
        "activation": ".depthwise",
        "se_excite": ".excite",
        "project_bn": ".project",
        "add": "",
    }
    blocks = block_names(model.config.vision_config)
    if name == "image.stem_activation":
        return "vision_model.stem"
    if name == "image.last_feature_map":
        return f"vision_model.layers.{len(blocks) - 1}"
    found = re.fullmatch(r"image\.(block\d+[a-z])_(\w+)", name)
    return f"vision_model.layers.{blocks.index(found[1])}{places[found[2]]}" if found else None

from random import Random

import numpy as np
import torch
from PIL import Image

from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.painter import CONVERSION, LOSSES, OPTIONS, config_from_original
from hfvlm.conversion.processors import FILTERS
from hfvlm.models.painter import HfvlmPainterImageProcessor, HfvlmPainterProcessor, codes, instances, keypoints, pairs
from hfvlm.models.painter.modeling_painter import counted, painting_loss
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder, UnknownOptionError

# What the original's scripts call our tasks.
TASKS = {"pose": "keypoints", "lowlight": "low_light"}
GENERATOR = {
    "num_masking_patches": "total",
    "min_num_patches": "least",
    "max_num_patches": "most",
    "min_aspect": "lowest_aspect",
    "max_aspect": "highest_aspect",
}
# Of a sample of pairs.
SAMPLE = {"name", "seed", "interpolation1", "interpolation2", "second_crop", "draws"}


def compare(golden: Golden) -> None:
    golden.check(config=OPTIONS, generator=("input_size", *GENERATOR))
    run = next((run for name, run in KINDS.items() if name in golden.case or name in golden.inputs), None)
    assert run, f"{golden.folder.name}: no runner for such a case"
    run(golden)


def model_of(golden: Golden):
    config = config_from_original(golden.case, golden.state_dict)
    return converted("painter", golden.state_dict, config, CONVERSION.layout_of(golden.case))


def outputs_of(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs
    given = (inputs["imgs"], inputs["tgts"], mask_of(inputs, model), inputs.get("valid"))
    grid = tuple(size // model.config.patch_size for size in inputs["imgs"].shape[-2:])
    layers = range(len(model.layers))
    paths = [
        "decoder.projection",
        "decoder.conv",
        *(f"layers.{i}{part}" for i in layers for part in ("", ".attention")),
    ]
    with torch.no_grad(), Recorder(model, paths) as seen:
        output = model(*given, return_loss=True)
        values = {"patch_embed": model.patches(inputs["imgs"])}
        values |= {f"block{i}_attn": seen[f"layers.{i}.attention"] for i in layers}
        values |= {f"block{i}": seen[f"layers.{i}"] for i in layers}
        values["decoder_embed"], taken = seen["decoder.projection"], model.config.intermediate_hidden_state_indices
        values |= {f"latent{n}": model.norm(seen[f"layers.{i}"]) for n, i in enumerate(taken)}
    values = {name: value.unflatten(1, grid) for name, value in values.items()}
    for i in model.config.window_indices:
        values[f"block{i}_attn"] = in_windows(model.layers[i].attention, seen[f"layers.{i}.attention:input"], grid)
    values |= {"pred_image": output.reconstruction, "loss": output.loss.reshape(1)}
    values |= {"decoder_conv": seen["decoder.conv"], "pred_patches": in_patches(output.reconstruction, grid)}
    hidden = model.hidden_pixels(model.hidden_patches(*given[::2], grid), grid)
    for name in golden.case.get("also_losses", ()):
        loss = painting_loss(output.reconstruction, given[1], hidden, given[3], LOSSES[name])
        values[f"loss_{name}"] = loss.reshape(1)
    rows = golden.section("stored_rows")
    for name in golden.in_order():
        golden.compare(name, values[name][: rows.get(name)])


def in_windows(attention, x, grid):
    """What the original's attention gives: windows, with the padding of those at the edges."""
    windows, _ = attention.partition(x.unflatten(1, grid), attention.window)
    with torch.no_grad():
        return attention.attend_grid(windows, (attention.window,) * 2)[0].unflatten(1, (attention.window,) * 2)


def in_patches(image, grid):
    """(B, 3, H, W) -> (B, N, p * p * 3)."""
    x = image.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def mask_of(inputs, model):
    """The original hides nothing where no mask is given."""
    rows, columns = (size // model.config.patch_size for size in inputs["imgs"].shape[-2:])
    return inputs.get("bool_masked_pos", torch.zeros(len(inputs["imgs"]), rows * columns))


def training(golden: Golden) -> None:
    """Masks, losses and gradients."""
    case, inputs, model = golden.case, golden.inputs, model_of(golden)
    sizes = dict(case["generator"])
    rows, columns = sizes.pop("input_size")
    mask = pairs.PairMask(rows, columns, **{"most": None, "least": 4} | {GENERATOR[k]: v for k, v in sizes.items()})
    random, numbers = Random(case["seed"]), np.random.RandomState(case["seed"])
    masks = torch.from_numpy(np.stack([mask(random, numbers) for _ in range(case["n_masks"])]))
    half = torch.from_numpy(mask.lower_half())
    golden.compare("block_masks", masks)
    golden.compare("half_mask", half)
    images, targets, valid = inputs["imgs"], inputs["tgts"], inputs["valid"]
    table = CONVERSION.keys_for(model.config, "painter", golden.state_dict)
    for kind, hidden in (
        ("half", half.expand(len(images), -1, -1)),
        ("random", masks[:1].expand(len(images), -1, -1)),
    ):
        for loss in case["loss_funcs"]:
            model.config.pixel_loss = LOSSES[loss]
            model.zero_grad()
            value = model(images, targets, hidden, valid, return_loss=True).loss
            value.backward()
            golden.compare(f"{kind}.{loss}.loss", value.reshape(1))
            grid = (rows, columns)
            pixels = model.hidden_pixels(model.hidden_patches(images, hidden, grid), grid)
            golden.compare(f"{kind}.{loss}.valid_sum_after", counted(targets, pixels, valid).sum().reshape(1))
            gradients = restore_keys({name: p.grad for name, p in model.named_parameters()}, table)
            norms = torch.stack([gradients[key].norm() for key in case["grad_order"]])
            golden.compare(f"{kind}.{loss}.grad_norms", norms)


def inference(golden: Golden) -> None:
    case, model = golden.case, model_of(golden)
    height, width = model.config.image_size
    processor = HfvlmPainterProcessor(HfvlmPainterImageProcessor(size={"height": height // 2, "width": width}))
    image, target, query = (golden.folder / case[name] for name in ("prompt_image", "prompt_target", "query_image"))
    inputs = processor(images=query, prompts=(image, target))
    grid = (height // model.config.patch_size, width // model.config.patch_size)
    hidden = model.hidden_patches(inputs["pixel_values"], None, grid)
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    stride = case["stride"]
    for name, values in (("imgs", inputs["pixel_values"]), ("tgts", inputs["target_values"])):
        golden.compare(name, values[0, :, ::stride, ::stride].movedim(0, -1))
    golden.compare("mask_rows", hidden[0].unflatten(0, grid)[:, 0].to(torch.uint8))
    golden.compare("mask_sum", hidden.sum().reshape(1))
    golden.compare("loss", output.loss.reshape(1))
    golden.compare("pred", output.reconstruction[0, :, ::stride, ::stride])
    rounding = golden.errors["pred"] * output.reconstruction.abs().max()
    size = case["size"][::-1]
    for name in case["tasks"]:
        task = TASKS.get(name, name)
        (painted,) = processor.paintings(output.reconstruction, task, [size])
        picture = torch.from_numpy(painted)
        # Whole numbers are cut off what the network paints: one that its rounding moves across is either of two.
        above, below = (
            torch.from_numpy(processor.paintings(output.reconstruction + shift, task, [size])[0])
            for shift in (rounding, -rounding)
        )
        certain = above == below
        assert certain.double().mean() > 0.9
        golden.compare(f"{name}.picture", picture[::2, ::2], certain[::2, ::2])
        golden.compare(f"{name}.mean", picture.double().mean().reshape(1))
        if f"{name}.raw" in golden.outputs:
            half = processor.image_processor.paint_of(output.reconstruction).chunk(2, dim=2)[1]
            raw = torch.nn.functional.interpolate(half, size=size, mode="bicubic")[0].movedim(0, -1)
            golden.compare(f"{name}.raw", raw[::2, ::2])


def processor_pairs(golden: Golden) -> None:
    case = golden.case
    processor = HfvlmPainterProcessor(HfvlmPainterImageProcessor(size=case.get("size", 448)))
    for index, (prompt, query) in enumerate(case["pairs"]):
        first, second = golden.folder / prompt, golden.folder / query
        pixels = processor(images=second, prompts=(first, first))["pixel_values"][0]
        stride = case["stride"]
        golden.compare(f"pair{index}.pixels", pixels[:, ::stride, ::stride])
        golden.compare(f"pair{index}.mean", pixels.double().mean(dim=(1, 2)))
        golden.compare(f"pair{index}.std", pixels.double().std(dim=(1, 2), correction=0))


def transforms(golden: Golden) -> None:
    case, inputs = golden.case, golden.inputs
    augmentation = pairs.PairAugmentation(case["input_size"][1])
    for sample in case["samples"]:
        if unknown := set(sample) - SAMPLE:
            raise UnknownOptionError(f"a sample has {unknown}; the runner knows {SAMPLE}")
        filters = [FILTERS[sample[f"interpolation{i}"]] for i in (1, 2)]
        boxes, draws = drawn(sample["draws"], augmentation)
        made = [
            augmentation.apply(
                *(Image.fromarray(inputs[f"{name}{i}"].numpy()) for name in ("image", "target")), draw, filters=filters
            )
            for i, draw in enumerate(draws)
        ]
        stride = case["stride"]
        for name, values, resample in zip(("image", "target"), zip(*made, strict=True), filters, strict=True):
            both = torch.cat(values, dim=1)
            golden.compare(f"{sample['name']}.{name}", both[:, ::stride, ::stride])
            if sample["second_crop"]:
                again = pairs.recrop(both, boxes[0], resample)
                golden.compare(f"{sample['name']}.{name}_second", again[:, ::stride, ::stride])


def drawn(draws, augmentation):
    """The draws of a sample: of the second crop, and of each pair."""
    boxes, found = [], []
    for kind, numbers in draws:
        if kind == "crop":
            boxes.append(pairs.Box(*map(int, numbers)))
        elif kind == "apply":
            jitter, applied = None, numbers[0] <= augmentation.jitter
        elif kind == "jitter" and applied:
            jitter = pairs.Jitter(tuple(map(int, numbers[:4])), *numbers[4:])
        elif kind == "flip":
            found.append(pairs.Draw(boxes.pop(0), jitter, numbers[0] < augmentation.flip))
        elif kind != "jitter":
            raise UnknownOptionError(f"a draw of {kind!r}; the runner knows crop, apply, jitter, flip")
    return boxes, found


def semantic(golden: Golden) -> None:
    labels, picture = golden.inputs["ade_labels"].numpy(), golden.inputs["picture"]
    ids = golden.case.get("coco_category_ids_in_colour_order")
    assert ids is None or tuple(ids) == codes.COCO_IDS
    encoded = codes.encode_classes(labels - 1)
    values = {
        "ade_palette": torch.from_numpy(codes.palette_of("ade20k")),
        "coco_palette": torch.from_numpy(codes.palette_of("coco")),
        "ade_encoded": torch.from_numpy(encoded),
        "ade_roundtrip": torch.from_numpy(codes.decode_classes(encoded)),
    }
    for kind in codes.DISTANCES:
        for name, palette in (("ade", "ade20k"), ("coco", "coco")):
            values[f"{name}_decoded.{kind}"] = torch.from_numpy(codes.decode_classes(picture, palette, kind))
            values[f"{name}_dist.{kind}"] = codes.class_distances(picture, palette, kind)[::4, ::4]
    for name in golden.in_order():
        golden.compare(name, values[name])


def depth(golden: Golden) -> None:
    case, inputs = golden.case, golden.inputs
    encoded = codes.encode_depth(inputs["depth_millimetres"].numpy())
    resized = Image.fromarray(encoded).resize((case["res"], case["res"]), Image.Resampling.BICUBIC)
    golden.compare("encoded", torch.from_numpy(encoded))
    golden.compare("resized", torch.from_numpy(np.array(resized)))
    lower = inputs["normalised_output"].movedim(-1, 1)
    (decoded,) = HfvlmPainterProcessor(HfvlmPainterImageProcessor()).paintings(
        torch.cat([lower, lower], dim=2), "depth", [case["size"][::-1]]
    )
    golden.compare("decoded_millimetres", torch.from_numpy(decoded))


def keypoint_codes(golden: Golden) -> None:
    case, inputs = golden.case, golden.inputs
    label = keypoints.encode_keypoints(inputs["joints"].numpy(), inputs["visible"].numpy())
    noise = np.random.RandomState(case["seed"] + 1).randint(-20, 21, label.shape)
    maps = torch.from_numpy(keypoints.decode_keypoints((label + noise).clip(0, 255)))
    y, x, height, width = case["crop"]
    stored = torch.from_numpy(label)
    golden.compare("colours", torch.from_numpy(keypoints.joint_colors()))
    golden.compare("label_crop", stored[y : y + height, x : x + width])
    golden.compare("label_channel_sums", stored.sum(dim=(0, 1), dtype=torch.int64))
    golden.compare("label_nonzero", (stored != 0).any(dim=-1).sum().reshape(1))
    golden.compare("decoded_max", maps.amax(dim=(1, 2)))
    golden.compare("decoded_argmax", maps.flatten(1).argmax(dim=1))
    golden.compare("decoded_sum", maps.sum(dim=(1, 2)))
    golden.compare("decoded_strided", maps[:, ::8, ::8])


def instance_codes(golden: Golden) -> None:
    case, inputs = golden.case, golden.inputs
    masks, picture, stored = inputs["masks"].numpy(), inputs["picture"], case["stored_masks"]
    golden.compare("palette", torch.from_numpy(instances.place_colors()))
    golden.compare("palette_locations", torch.from_numpy(instances.places().astype(np.uint8)))
    golden.compare("encoded.mass_center", torch.from_numpy(instances.encode_instances(masks)))
    golden.compare("encoded.geo_center", torch.from_numpy(instances.encode_instances(masks, boxes_of(masks))))
    whole = instances.candidates(picture, case["dist_thr"])
    chosen = instances.decode_instances(picture, threshold=case["dist_thr"], most=case["max_num"])
    for name, found in (("threshold", chosen), ("threshold.keep_all", whole)):
        golden.compare(f"{name}.scores", found.scores)
        golden.compare(f"{name}.classes", found.classes)
        golden.compare(f"{name}.areas", found.masks.sum(dim=(1, 2)))
        golden.compare(f"{name}.masks", found.masks[:stored])
    near, nearest, distance = instances.decode_nearest(picture)
    golden.compare("minmax.scores", near.scores)
    golden.compare("minmax.classes", near.classes)
    golden.compare("minmax.pred_map", nearest)
    golden.compare("minmax.dist_map", distance)
    distances = codes.class_distances(inputs["semantic_picture"], "coco")
    golden.compare("merged.classes_of_first_8", instances.vote(whole.masks[:8], distances))
    for kernel in ("gaussian", "linear"):
        scores, labels, _, kept = instances.matrix_nms(
            *(inputs[f"nms_{name}"] for name in ("masks", "labels", "scores")),
            kernel=kernel,
            sigma=case["sigma"],
            least=case["filter_thr"],
            before=case["nms_pre"],
            most=case["max_num"],
        )
        for name, value in (("scores", scores), ("labels", labels), ("keep_inds", kept)):
            golden.compare(f"nms.{kernel}.{name}", value)


def boxes_of(masks):
    """Boxes around masks, from their first pixel to the end of their last."""
    grids = [mask.nonzero() for mask in masks]
    return np.array([(x.min(), y.min(), x.max() + 1, y.max() + 1) for y, x in grids], dtype=np.float32)


# By a name in the case or among its inputs.
KINDS = {
    "generator": training,
    "imgs": outputs_of,
    "prompt_image": inference,
    "pairs": processor_pairs,
    "samples": transforms,
    "ade_labels": semantic,
    "depth_millimetres": depth,
    "joints": keypoint_codes,
    "nms_masks": instance_codes,
}

"""Prompt templates for the name of a class. Each is a text with one `{}`."""

# The prompt set that CLIP's authors found for ImageNet
# (https://github.com/openai/CLIP/blob/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb, MIT licence), one a line.
_IMAGENET = """
a bad photo of a {}.
a photo of many {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}.
"""

# Those that Wukong's authors evaluate with on ImageNet, two of them twice
# (huawei-noah/Pretrained-Language-Model at 0598f02, Noah_WuKong/data/res/prompts.txt, Apache-2.0).
_IMAGENET_ZH = """
{}的照片。 质量差的{}的照片。 许多{}的照片。 {}的雕塑。 难以看到{}的照片。 {}的低分辨率照片。
{}的渲染。 涂鸦{}。 {}的糟糕照片。 {}的裁剪照片。 {}的纹身。 {}的刺绣照片。 很难看到{}的照片。
{}的明亮照片。 一张干净的{}的照片。 一张包含{}的照片。 {}的深色照片。 {}的手绘画。 我的{}的照片。
不自然的{}的照片。 一张酷的{}的照片。 {}的特写照片。 {}的黑白照片。 一幅{}的画。 一幅{}的绘画。
一张{}的像素照片。 {}的雕像。 一张{}的明亮照片。 {}的裁剪照片。 人造的{}的照片。 一张关于{}的照片。
损坏的{}的jpeg照片。 {}的模糊照片。 {}的相片。 一张{}的好照片。 {}的渲染照。 视频游戏中的{}。
一张{}的照片。 {}的涂鸦。 {}的近距离照片。 {}的折纸。 {}在视频游戏中。 {}的草图。 {}的涂鸦照。
{}的折纸形状。 低分辨率的{}的照片。 玩具{}。 {}的副本。 {}的干净的照片。 一张大{}的照片。 {}的重现。
一张漂亮的{}的照片。 一张奇怪的{}的照片。 模糊的{}的照片。 卡通{}。 {}的艺术作品。 {}的素描。
刺绣{}。 {}的像素照。 {}的拍照。 {}的损坏的照片。 高质量的{}的照片。 毛绒玩具{}。 漂亮的{}的照片。
小{}的照片。 照片是奇怪的{}。 漫画{}。 {}的艺术照。 {}的图形。 大{}的照片。 黑白的{}的照片。
{}毛绒玩具。 一张{}的深色照片。 {}的摄影图。 {}的涂鸦照。 玩具形状的{}。 拍了{}的照片。
酷酷的{}的照片。 照片里的小{}。 {}的刺青。
"""

SETS: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "single": ("a photo of a {}.",),
    # The seven that forward selection over the eighty found, from the same notebook.
    "imagenet-7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "imagenet": tuple(_IMAGENET.strip().splitlines()),
    "imagenet-zh": tuple(_IMAGENET_ZH.split()),
}


def template_set(templates: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return a set by its name ("name", "single", "imagenet-7", "imagenet", "imagenet-zh"), or one's own templates.

    Raises:
        ValueError: there is no such set, or a template has not exactly one `{}`.
    """
    if isinstance(templates, str):
        if templates in SETS:
            return SETS[templates]
        if "{}" not in templates:
            raise ValueError(f"No set of templates is called {templates!r}; there are {', '.join(SETS)}.")
        templates = [templates]
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"{wrong[0]!r}: a template has one {{}}, where the class goes.")
    if not templates:
        raise ValueError("An empty set of templates names no class.")
    return tuple(templates)

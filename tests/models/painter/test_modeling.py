import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoModelForImageToImage

import hfvlm
from hfvlm.models.painter import HfvlmPainterConfig, HfvlmPainterModel
from hfvlm.models.painter.modeling_painter import painting_loss, relative
from tests.support.suite import ModelSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Eight rows of four patches: windows of three patches do not fit.
CONFIG = SIZES | {
    "image_size": (32, 16),
    "patch_size": 4,
    "pretrain_image_size": 12,
    "window_size": 3,
    "window_indices": [1],
    "merge_index": 0,
    "intermediate_hidden_state_indices": [0, 1],
    "decoder_hidden_size": 4,
    "drop_path_rate": 0.0,
}


class TestPainter(ModelSuite):
    model_class, auto_class = HfvlmPainterModel, AutoModelForImageToImage
    implementations = ("sdpa",)

    def config(self):
        return HfvlmPainterConfig(**CONFIG)

    def inputs(self):
        mask = torch.rand(3, 8, 4) < 0.5
        return {
            "pixel_values": torch.randn(3, 3, 32, 16),
            "target_values": 1 + torch.rand(3, 3, 32, 16),
            "bool_masked_pos": mask,
        }

    def loss_inputs(self):
        return {"return_loss": True}

    @pytest.fixture
    def shallow(self, model):
        """Its layers are of two kinds."""
        return model

    def test_hidden_patches_of_the_target_do_not_matter(self, model, batch):
        expected = model(**batch).reconstruction
        hidden = model.hidden_pixels(batch["bool_masked_pos"].flatten(1), (8, 4))
        other = torch.where(hidden, torch.randn(3, 3, 32, 16), batch["target_values"])
        close(model(**batch | {"target_values": other}).reconstruction, expected, 1e-6, "others behind the mask")
        shown = torch.where(hidden, batch["target_values"], torch.randn(3, 3, 32, 16))
        assert not torch.allclose(model(**batch | {"target_values": shown}).reconstruction, expected, atol=1e-3)

    def test_without_a_mask_the_lower_half_is_hidden(self, model, batch):
        del batch["bool_masked_pos"]
        mask = torch.zeros(3, 8, 4)
        mask[:, 4:] = 1
        close(model(**batch).reconstruction, model(**batch, bool_masked_pos=mask).reconstruction, 0.0, "default")

    def test_windows_are_attended_to_alone(self, model):
        """As each window by itself, with zeros around the image, which have keys as any patch has."""
        attention = model.layers[1].attention
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(2, 32, 32)
        found, _ = attention(x, grid=(8, 4))
        padded = F.pad(x.unflatten(1, (8, 4)), (0, 0, 0, 2, 0, 1))
        expected = torch.zeros(2, 9, 6, 32)
        for row in range(0, 9, 3):
            for column in range(0, 6, 3):
                window = padded[:, row : row + 3, column : column + 3].flatten(1, 2)
                out, _ = attention.attend_grid(window, (3, 3))
                expected[:, row : row + 3, column : column + 3] = out.unflatten(1, (3, 3))
        close(found, expected[:, :8, :4].flatten(1, 2), 1e-6, "windows")

    def test_scores_of_positions_are_those_of_each_pair(self, model):
        attention = model.layers[0].attention
        with torch.no_grad():
            attention.row_position.normal_()
            attention.column_position.normal_()
            query = torch.randn(1, 2, 32, 16)
            scores = attention.position_scores(query, (8, 4))
        for i in (0, 5, 31):
            for j in (0, 14, 30):
                row, column = i // 4 - j // 4 + 7, i % 4 - j % 4 + 3
                expected = query[0, :, i] @ (attention.row_position[row] + attention.column_position[column])
                close(scores[0, :, i, j], expected, 1e-5, f"{i} to {j}")

    def test_images_of_another_size(self, model):
        """Tables of positions are resized, those of attention along their axes."""
        output = model(torch.randn(1, 3, 48, 24), torch.randn(1, 3, 48, 24))
        assert output.reconstruction.shape == (1, 3, 48, 24)
        table = torch.arange(7.0)[:, None]
        assert torch.equal(
            relative(table, 4)[:, :, 0], torch.tensor([[3.0 + i - j for j in range(4)] for i in range(4)])
        )
        assert relative(table, 6).shape == (6, 6, 1)

    def test_what_does_not_fit_is_refused(self, model, batch):
        images = batch["pixel_values"]
        with pytest.raises(ValueError, match=r"target_values \(3, 3, 16, 16\)"):
            model(images, images[:, :, :16])
        with pytest.raises(ValueError, match="whole patches of 4 pixels"):
            model(images[..., :30, :15], images[..., :30, :15])
        with pytest.raises(ValueError, match="bool_masked_pos is .* 3 rows of 32 patches, 8 of 4"):
            model(images, images, torch.zeros(3, 30))
        with pytest.raises(TypeError, match="tgts"):
            model(images, images, tgts=images)


class TestPainterWithoutPositionsInAttention(TestPainter):
    """Queries without biases, no relative positions, and a bottleneck of convolutions: options of no release."""

    test_compiles_as_one_graph = test_exports = test_scores_of_positions_are_those_of_each_pair = None
    test_every_adapter_learns_under_gradient_checkpointing = test_gradient_checkpointing_changes_nothing = None

    def config(self):
        options = {"qkv_bias": False, "use_relative_positions": False, "residual_indices": [0], "pixel_loss": "l1l2"}
        return HfvlmPainterConfig(**CONFIG | options)


def test_what_is_counted_in_the_loss():
    """Only hidden pixels, by their weights, of samples whose shown part is not black."""
    target, painted = torch.ones(3, 3, 20, 20), torch.zeros(3, 3, 20, 20)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hidden = torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    hidden[:, :, 10:] = True
    weights = torch.ones(3, 3, 20, 20)
    weights[0] = 10
    target[2, :, :10] = -(mean / std).expand(3, 10, 20)  # black, where it is shown
    target[2, :, 10:] = 100
    painted[1] = 0.5
    for kind, values in {"l1": (1, 0.5), "l2": (1, 0.25), "l1l2": (1, 0.375), "smooth_l1": (0.995, 0.495)}.items():
        loss = painting_loss(painted, target, hidden, weights, kind)
        assert loss.item() == pytest.approx((6000 * values[0] + 600 * values[1]) / (6600 + 0.01), rel=1e-5), kind
    assert painting_loss(painted[2:], target[2:], hidden[2:], None, "l1") == 0
    given = weights.clone()
    painting_loss(painted, target, hidden, weights, "l1")
    assert torch.equal(weights, given)  # the original's are changed in place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (30, 16)}, "image_size .* multiples of 8 and 4"),
        ({"window_indices": [2]}, r"window_indices \[2\] must be layers of 0 to 1"),
        ({"intermediate_hidden_state_indices": [1, 0]}, "in order"),
        ({"merge_index": 1}, "merge_index 1 must be a layer before the decoder's"),
        ({"pixel_loss": "huber"}, "must be one of smooth_l1, l1, l2, l1l2"),
        ({"pretrain_image_size": 3}, "smaller than patch_size"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        HfvlmPainterConfig(**CONFIG | options)


def test_recipes():
    tuned = hfvlm.lora(HfvlmPainterModel(HfvlmPainterConfig(**CONFIG)), "tower", quiet=True)
    trained = {name.split(".")[-4] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}

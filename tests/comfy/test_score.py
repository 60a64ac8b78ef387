"""Score Pictures on small encoders with random weights, against transformers in float64."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training import pack

LoraError = pack("lora2.util.errors").LoraError
WIDTH, SIZE = 32, 28
VISION = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": 14, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "quick_gelu",
    "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
DINO = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE, "patch_size": 14, "mlp_ratio": 4,
    "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

CLOSE = 2e-5
"""Encoders compute in float32 here: some hundred operations of 1e-7 relative error each, through softmax and norms."""


def randomized(model: torch.nn.Module, seed: int) -> Any:
    """Weights that make every part matter, biases and norms too, in numbers that half precision holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        shape = parameter.shape
        spread = 1.5 * shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        drawn = torch.randn(shape, generator=generator) * spread + float(parameter.ndim == 1) * 0.5
        parameter.data = drawn.half().float()
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> Any:
    """The whole CLIP of transformers, pictures and text."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={**TEXT, "vocab_size": 49408, "projection_dim": WIDTH}, projection_dim=WIDTH,
        vision_config={**VISION, "projection_dim": WIDTH},
    )  # fmt: skip
    return randomized(CLIPModel(config), 0)


@pytest.fixture(scope="module")
def dino_reference() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return randomized(Dinov2Model(Dinov2Config(**DINO)), 1)


def published(model: Any, folder: Path) -> dict[str, Tensor]:
    """The weights under the names that files have."""
    model.float().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """An encoder as Load CLIP Vision gives it."""
    import comfy.clip_vision

    encoder = comfy.clip_vision.ClipVisionModel(config)
    missing, _ = encoder.load_sd(weights)
    assert not missing
    return encoder


@pytest.fixture
def vision(comfy: Any, reference: Any, tmp_path: Path) -> Any:
    weights = {k: v for k, v in published(reference, tmp_path).items() if k.startswith("vis")}
    return loaded({**VISION, "projection_dim": WIDTH, "model_type": "clip_vision_model"}, weights)


@pytest.fixture
def dino(comfy: Any, dino_reference: Any, tmp_path: Path) -> Any:
    config = {**DINO, "model_type": "dinov2", "use_swiglu_ffn": False, "image_mean": MEAN, "image_std": STD}
    return loaded(config, published(dino_reference, tmp_path))


def text_encoder(weights: dict[str, Tensor]) -> Any:
    """A CLIP-L of a small size as Load CLIP gives it."""
    import comfy.sd
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer

    target = types.SimpleNamespace(params={}, clip=SD1ClipModel, tokenizer=SD1Tokenizer)
    return comfy.sd.CLIP(target, model_options={"clip_l_model_config": TEXT}, state_dict=[weights])


@pytest.fixture
def clip(comfy: Any, reference: Any, tmp_path: Path) -> Any:
    return text_encoder({k: v for k, v in published(reference, tmp_path).items() if k.startswith("text_")})


def pictures(count: int, seed: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Smooth random pictures in whole 255ths, as files hold them: (count, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (large.movedim(1, -1) * 255).round() / 255


def score(*images: Tensor, references: Any, encoder: Any, prompt: str = "", **more: Any) -> Any:
    """The node as ComfyUI calls it: every input a list."""
    node = pack("nodes.score").ScorePictures
    others = references if isinstance(references, list) else [references]
    with torch.inference_mode():
        out = node.execute(
            images=list(images),
            references=others,
            encoder=[encoder],
            prompt=[prompt],
            **{k: [v] for k, v in more.items()},
        )
    return out.result


def cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return a @ b.T


def pixels(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(count, 3, size, size) float64 from pictures that have the encoder's size."""
    return ((images.double() - torch.tensor(mean).double()) / torch.tensor(std).double()).movedim(-1, 1)


def clip_vectors(model: Any, images: Tensor) -> Tensor:
    model = model.double()
    out = model.vision_model(pixel_values=pixels(images, CLIP_MEAN, CLIP_STD)).pooler_output
    return model.visual_projection(out).detach()


def test_clip_i_is_that_of_transformers(vision: Any, reference: Any) -> None:
    images, references = pictures(5, 0), pictures(3, 1)
    table = cosine(clip_vectors(reference, images), clip_vectors(reference, references))
    text, clip_i, dino, clip_t, data = score(images, references=references, encoder=vision)
    assert clip_i == pytest.approx(float(table.mean()), abs=CLOSE)
    assert json.loads(data)["each"]["CLIP-I"] == pytest.approx(table.mean(1).tolist(), abs=CLOSE)
    assert table.std() > 100 * CLOSE, "the pictures differ by far more than the tolerance"
    assert "| CLIP-I |" in text
    assert "DINO" not in text
    assert (type(dino).__name__, type(clip_t).__name__) == ("ExecutionBlocker",) * 2
    assert "connect a DINOv2" in dino.message


def test_dino_is_that_of_transformers(dino: Any, dino_reference: Any) -> None:
    images, references = pictures(4, 2), pictures(2, 3)
    model = dino_reference.double()
    one, other = (model(pixel_values=pixels(x, MEAN, STD)).pooler_output.detach() for x in (images, references))
    result = score(images, references=references, encoder=dino)
    assert result[2] == pytest.approx(float(cosine(one, other).mean()), abs=CLOSE)
    assert "CLIP-I was not measured" in result[1].message
    assert json.loads(result[4])["encoders"] == {"DINO": "dinov2, width 48, 3 layers, 28 px"}


PROMPTS = ["a photo of a blue mug", "a mug on the beach, with palm trees behind it", "mug"]


def test_clip_t_is_that_of_transformers(vision: Any, clip: Any, reference: Any) -> None:
    """The text's vector is the projected one, at the end of the text; the tokens are those of ComfyUI's tokenizer."""
    images, references = pictures(3, 4), pictures(2, 5)
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([[token for token, _ in clip.tokenize(prompt)["l"][0]]])
        out = reference.double().text_model(input_ids=ids)
        rows.append(reference.text_projection(out.pooler_output).detach())
    table = cosine(clip_vectors(reference, images), torch.cat(rows))
    together = score(images, references=references, encoder=vision, clip=clip, prompt="\n".join(PROMPTS))
    assert together[3] == pytest.approx(float(table.diagonal().mean()), abs=CLOSE)
    assert table.std() > 100 * CLOSE
    for i, prompt in enumerate(PROMPTS):
        alone = score(images, references=references, encoder=vision, clip=clip, prompt=prompt)
        assert json.loads(alone[4])["each"]["CLIP-T"] == pytest.approx(table[:, i].tolist(), abs=CLOSE)
    skipped = clip.clone()
    skipped.clip_layer(-2)
    again = score(images, references=references, encoder=vision, clip=skipped, prompt="\n".join(PROMPTS))
    assert again[3] == together[3], "CLIP Set Last Layer does not change the text's vector"


def test_all_three_at_once_and_lists_of_sizes(vision: Any, dino: Any, clip: Any) -> None:
    """Lists of batches are scored as their pictures are, in their order; which input an encoder is in does not matter."""
    tall, wide, references = pictures(2, 6, 64, 40), pictures(1, 7, 30, 90), [pictures(1, 8), pictures(2, 9, 50, 50)]
    more = {"clip": clip, "prompt": "a\nb\nc"}
    both = score(tall, wide, references=references, encoder=vision, second_encoder=dino, **more)
    turned = score(tall, wide, references=references, encoder=dino, second_encoder=vision, **more)
    assert both[1:4] == turned[1:4]
    each = json.loads(both[4])["each"]
    assert {name: len(values) for name, values in each.items()} == {"CLIP-I": 3, "DINO": 3, "CLIP-T": 3}
    last = score(wide, references=references, encoder=vision, second_encoder=dino, clip=clip, prompt="c")
    assert [last[i] for i in (1, 2, 3)] == pytest.approx(
        [each[name][2] for name in ("CLIP-I", "DINO", "CLIP-T")], abs=CLOSE
    )


def test_a_picture_is_scaled_and_cropped_to_the_middle_as_the_encoder_wants(vision: Any, reference: Any) -> None:
    """Against Pillow's bicubic filter, whose results are rounded to 255ths between its passes: 1 / 255 on a pixel."""
    large, references = pictures(1, 10, 56, 84), pictures(1, 11)
    picture = Image.fromarray((large[0] * 255).round().to(torch.uint8).numpy())
    small = picture.resize((42, 28), Image.Resampling.BICUBIC).crop((7, 0, 35, 28))
    expected = torch.from_numpy(np.asarray(small).copy())[None] / 255
    table = cosine(clip_vectors(reference, expected), clip_vectors(reference, references))
    assert score(large, references=references, encoder=vision)[1] == pytest.approx(float(table), abs=2e-3)
    off = torch.from_numpy(np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC)).copy())[None] / 255
    assert abs(float(cosine(clip_vectors(reference, off), clip_vectors(reference, references)) - table)) > 6e-3


def test_pictures_are_encoded_in_parts(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = pictures(37, 12), []
    whole = score(images, references=images[:2], encoder=vision)
    ordinary = vision.encode_image
    monkeypatch.setattr(vision, "encode_image", lambda part, crop: sizes.append(len(part)) or ordinary(part, crop))
    assert score(images, references=images[:2], encoder=vision)[1] == whole[1]
    assert sizes == [16, 16, 5, 2]


def test_a_fourth_channel_does_not_count(vision: Any) -> None:
    images = pictures(2, 13)
    clear = torch.cat([images, torch.rand(2, SIZE, SIZE, 1, generator=torch.Generator().manual_seed(0))], dim=-1)
    assert score(clear, references=images, encoder=vision)[1] == score(images, references=images, encoder=vision)[1]


# -- what cannot be scored -----------------------------------------------------------------------------------


def refused(*images: Tensor, **inputs: Any) -> str:
    with pytest.raises(LoraError) as error:
        score(*images, **{"references": pictures(1, 0), **inputs})
    return str(error.value)


def test_inputs_that_do_not_go_together(vision: Any, dino: Any, clip: Any) -> None:
    images = pictures(2, 0)
    assert "Both encoders measure CLIP-I" in refused(images, encoder=vision, second_encoder=vision)
    assert "prompt is empty" in refused(images, encoder=vision, clip=clip)
    assert "only a DINO model" in refused(images, encoder=dino, clip=clip, prompt="a mug")
    assert "3 lines for 2 pictures" in refused(images, encoder=vision, clip=clip, prompt="a\nb\nc")
    assert "images is empty" in refused(images[:0], encoder=vision)
    assert "references is empty" in refused(images, encoder=vision, references=images[:0])
    assert "references must be color pictures" in refused(images, encoder=vision, references=images[..., 0])
    assert "images must be color pictures" in refused(images[..., :1], encoder=vision)


def test_encoders_without_one_vector_per_picture(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "model_type", "siglip_vision_model")
    message = refused(pictures(1, 0), encoder=vision)
    assert "siglip_vision_model does not give one vector" in message
    assert "Load CLIP Vision" in message


def test_a_text_encoder_of_another_clip(vision: Any, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = vision.encode_image
    narrow: Callable[..., Any] = lambda part, crop: {"image_embeds": ordinary(part, crop)["image_embeds"][:, :24]}  # noqa: E731
    monkeypatch.setattr(vision, "encode_image", narrow)
    message = refused(pictures(1, 0), encoder=vision, clip=clip, prompt="a mug")
    assert "vectors have 24 numbers; this CLIP has clip_l 32" in message


@pytest.mark.parametrize("memory", [0.0, float("nan"), 1e4])
def test_a_text_encoder_without_its_projection(vision: Any, clip: Any, memory: float) -> None:
    """As from an SD 1.x checkpoint: the host makes room for the projection, and nothing is loaded into it."""
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    weight.data[:] = 0
    weight.data[3, 5] = memory
    message = refused(pictures(1, 0), encoder=vision, clip=clip, prompt="a mug")
    assert "clip_l was loaded without its projection" in message
    assert "Load CLIP" in message


def test_broken_weights(vision: Any) -> None:
    vision.model.visual_projection.weight.data[0] = float("nan")
    assert "NaN, infinity or zero vectors" in refused(pictures(1, 0), encoder=vision)

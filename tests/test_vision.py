"""parts/vision.py against transformers: picture files, their sizes, patches and settings. The tower
is tested with the network, in test_model.py."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image

from oracles import make_config, make_model, save_checkpoint
from parts.chat import Processor
from parts.vision import picture_patches
from pictures import picture


@pytest.fixture(scope="module")
def processor(small):
    return Processor.from_pretrained(small.path)


def look(processor, *images):
    """pixel_values and image_grid_thw that our processor makes of a user turn with these
    pictures."""
    batch = processor([[{"role": "user",
                         "content": [{"type": "image", "image": image} for image in images]}]])
    return batch["pixel_values"], batch["image_grid_thw"]


def assert_pictures_equal(ours, theirs):
    """Within one 8-bit level in every channel. A patch is (channel, 2 frames, p, p), flattened."""
    (pixels, grid), reference = ours, torch.as_tensor(theirs["pixel_values"])
    assert grid.tolist() == theirs["image_grid_thw"].tolist()
    assert pixels.shape == reference.shape and pixels.dtype == torch.float32
    level = 1 / 255 / torch.tensor(Qwen2VLImageProcessorPil.image_std)
    off = (pixels - reference).abs().view(len(pixels), 3, -1).amax((0, 2))  # (channels,)
    assert (off <= 1.01 * level).all(), off


SIZES = {"tiny": (5, 7), "one pixel": (1, 1), "small": (40, 30), "exact": (84, 56),
         "halves of a token": (70, 42),
         "wide": (400, 20), "tall": (31, 260), "large": (500, 333), "as wide as allowed": (200, 1)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_equal_transformers(small, processor, size):
    image = picture(*size)
    assert_pictures_equal(look(processor, image),
                          Qwen2VLImageProcessorPil.from_pretrained(small.path)(image))


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_picture_modes_equal_transformers(small, processor, mode):
    image = picture(90, 60, mode)
    assert image.mode == mode
    assert_pictures_equal(look(processor, image),
                          Qwen2VLImageProcessorPil.from_pretrained(small.path)(image))


def test_transparent_palette_equals_transformers(small, processor, tmp_path):
    colours = picture(90, 60, "P")
    commonest = np.bincount(np.asarray(colours).ravel()).argmax().item()
    colours.save(tmp_path / "palette.png", transparency=commonest)
    image = Image.open(tmp_path / "palette.png")
    assert image.mode == "P" and "transparency" in image.info
    assert_pictures_equal(look(processor, image),
                          Qwen2VLImageProcessorPil.from_pretrained(small.path)(image))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_file_is_turned_upright(small, processor, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 3: upside down, 6: on its side
    picture(90, 60).save(tmp_path / "photo.jpg", exif=exif)
    upright = load_image(str(tmp_path / "photo.jpg"))
    assert upright.size == ((90, 60) if orientation == 3 else (60, 90))
    for path in (tmp_path / "photo.jpg", str(tmp_path / "photo.jpg"),
                 Image.open(tmp_path / "photo.jpg")):
        assert_pictures_equal(look(processor, path),
                              Qwen2VLImageProcessorPil.from_pretrained(small.path)(upright))


@pytest.mark.parametrize("change", [{"min_pixels": 784, "max_pixels": 4704},
                                    {"size": {"shortest_edge": 784, "longest_edge": 4704}}],
                         ids=["flat", "size"])
def test_both_spellings_of_the_pixel_limits(small, tmp_path, change):
    path = shutil.copytree(small.path, tmp_path / "limits")
    settings_file = path / "preprocessor_config.json"
    kept = {key: value for key,
            value in json.loads(settings_file.read_text()).items() if key != "size"}
    settings_file.write_text(json.dumps({**kept, **change}))
    theirs = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=4704)  # 1 and 6 tokens
    for size in ((300, 200), (20, 20)):
        assert_pictures_equal(look(Processor.from_pretrained(path), picture(*size)),
                              theirs(picture(*size)))


def test_patch_size_of_the_checkpoint(tmp_path):
    path = save_checkpoint(make_model(make_config(vision=dict(patch_size=8, window_size=48))),
                           tmp_path / "patch8")
    images = [picture(100, 70), picture(48, 64)]
    theirs = Qwen2VLImageProcessorPil.from_pretrained(path)(images)
    assert_pictures_equal(look(Processor.from_pretrained(path), *images), theirs)


def test_several_pictures_keep_their_order(small, processor):
    images = [picture(90, 60, seed=1), picture(56, 120, seed=2), picture(60, 60, "L", seed=3)]
    assert_pictures_equal(look(processor, *images),
                          Qwen2VLImageProcessorPil.from_pretrained(small.path)(images))


@pytest.mark.parametrize("size", [(201, 1), (3, 700)])
def test_extreme_aspect_ratio_is_refused(processor, size):
    with pytest.raises(ValueError, match="200"):
        look(processor, picture(*size))


def test_a_file_that_is_no_picture(processor, tmp_path):
    (tmp_path / "words.jpg").write_text("not a picture")
    for name in ("words.jpg", "absent.jpg"):
        with pytest.raises(ValueError, match=name):
            look(processor, tmp_path / name)


def test_picture_settings_as_transformers_saves_them_now(small, processor, tmp_path):
    """Its processors write the settings of their parts into processor_config.json
    (ProcessorMixin.to_json_file), and its image processor reads them back from there."""
    path = shutil.copytree(small.path, tmp_path / "new")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text(json.dumps({"image_processor": settings,
                                                            "processor_class": "x"}))
    theirs, ours = Qwen2VLImageProcessorPil.from_pretrained(path), Processor.from_pretrained(path)
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    expected = torch.as_tensor(theirs(images=[picture], return_tensors="pt")["pixel_values"])
    assert torch.equal(picture_patches(picture, ours.pictures)[0],
                       picture_patches(picture, processor.pictures)[0])
    assert (picture_patches(picture, ours.pictures)[0] - expected).abs().max() < 1e-4
    # beside an older file they go first, as for transformers
    (path / "preprocessor_config.json").write_text(json.dumps({**settings,
                                                               "image_mean": [0.1, 0.2, 0.3]}))
    theirs, ours = Qwen2VLImageProcessorPil.from_pretrained(path), Processor.from_pretrained(path)
    assert list(ours.pictures.image_mean) == list(theirs.image_mean) == settings["image_mean"]
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text('{"processor_class": "x"}')
    with pytest.raises(ValueError, match="processor_config.json: no picture settings"):
        Processor.from_pretrained(path)


@pytest.mark.parametrize("name, value",
                         [("do_resize", False), ("do_rescale", False), ("do_normalize", False),
                                         ("resample", 2), ("rescale_factor", 1 / 128)])
def test_picture_settings_that_change_the_pixels_are_refused(small, tmp_path, name, value):
    """Each makes other pixels in transformers."""
    path = shutil.copytree(small.path, tmp_path / "other")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    pixels = []
    for said in (settings, {**settings, name: value}):
        (path / "preprocessor_config.json").write_text(json.dumps(said))
        # which is not resized must fit
        image = picture.resize((84, 84)) if name == "do_resize" else picture
        pixels.append(torch.as_tensor(Qwen2VLImageProcessorPil.from_pretrained(path)(
            images=[image], return_tensors="pt")["pixel_values"]))
    assert name == "do_resize" or not torch.equal(*pixels)
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(path)

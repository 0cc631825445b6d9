"""Bytes of a picture become planes of red, green and blue: every kind of file, at its own size and at a smaller one."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers import images


def smooth(height, width):
    """A colourful picture without symmetry, which JPEG keeps well."""
    few = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(few, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(pixels, kind, mode=None, **options):
    """The pixels in a file that Pillow writes."""
    data, image = io.BytesIO(), Image.fromarray(pixels)
    image = image.quantize(256, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


def in_full(data, size):
    """The image decoded in full, then resized."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(int)


def distance(data, size):
    """The mean difference of the image decoded to this size from that."""
    image = images.decode(data, size=size, squash=True)
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and image.is_contiguous()
    return np.abs(image.permute(1, 2, 0).numpy() - in_full(data, size)).mean()


def test_every_kind_of_file_becomes_three_planes_of_bytes_in_rgb():
    colours = smooth(20, 24)
    grey, alpha = colours[..., 0], np.full_like(colours[..., :1], 7)
    wide = np.dstack([colours[..., ::-1], alpha]).astype(np.uint16) * 256 + 128  # as OpenCV writes it: blue first
    binary = (grey > 127) * np.uint8(255)
    files = {  # the file and how far its pixels may be from the original, at most
        "PNG of a palette": (encode(colours, "png", "P"), colours, 40),
        "grey PNG with alpha": (encode(np.dstack([grey, alpha]), "png"), grey, 0),
        "PNG of 16 bits": (cv2.imencode(".png", wide[..., :3])[1].tobytes(), colours, 1),
        "PNG of 16 bits with alpha": (cv2.imencode(".png", wide)[1].tobytes(), colours, 1),
        "PNG of 1 bit": (encode(binary, "png", "1"), binary, 0),
        "JPEG": (encode(colours, "jpeg", quality=100, subsampling=0), colours, 8),
        "grey JPEG": (encode(grey, "jpeg", quality=100), grey, 8),
        "CMYK JPEG": (encode(colours, "jpeg", "CMYK", quality=100), colours, 40),
        "WebP with alpha": (encode(np.dstack([colours, alpha]), "webp", lossless=True, exact=True), colours, 0),
        "grey BMP": (encode(grey, "bmp"), grey, 0),
        "TIFF": (encode(colours, "tiff"), colours, 0),
        "PPM": (encode(colours, "ppm"), colours, 0),
    }
    for kind, (data, pixels, most) in files.items():
        image = images.decode(data)
        assert image.shape == (3, 20, 24) and image.dtype == torch.uint8 and image.is_contiguous(), kind
        expected = pixels if pixels.ndim == 3 else np.dstack([pixels] * 3)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= most, kind
    for data in b"", b"no image", files["PPM"][0][:-30], files["JPEG"][0][:200]:
        with pytest.raises(ValueError, match="not an image"):
            images.decode(data)


def test_a_large_jpeg_of_any_kind_decoded_to_a_small_size_looks_like_the_whole():
    turned_by = Image.Exif()
    turned_by[0x0112] = 6
    thumbnail = encode(smooth(40, 50), "jpeg")  # other data in front of the frame's header
    kinds = {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"exif": turned_by}, {"subsampling": 0}
    for options in *kinds, {"comment": thumbnail}:
        data = encode(smooth(903, 601), "jpeg", quality=95, **options)
        for size in 16, 75, 224, 301, 700:
            assert distance(data, size) < 4, options
    for kind in "png", "webp", "bmp":
        assert distance(encode(smooth(600, 900), kind), 64) == 0


def test_a_jpeg_is_never_decoded_smaller_than_what_is_wanted():
    detail = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for scale in 8, 4, 2:
        shorter = 96 * scale - 8  # just not large enough for this scale
        for size in (shorter, shorter), (shorter, 1600), (1600, shorter):
            pixels = cv2.resize(detail, size, interpolation=cv2.INTER_NEAREST)
            data = encode(pixels, "jpeg", quality=95, subsampling=0)
            small = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | 8 * scale)  # 1 / scale
            small = cv2.resize(small, (96, 96), interpolation=cv2.INTER_AREA)
            assert distance(data, 96) < 0.6 * np.abs(small - in_full(data, 96)).mean()


def test_a_picture_keeps_its_shape_and_its_middle_is_taken_as_torchvision_does():
    stripes = np.zeros((60, 120, 3), np.uint8)
    stripes[:, :30] = stripes[:, 90:] = 255
    for turned in stripes, stripes.transpose(1, 0, 2):
        data = encode(turned, "png")
        assert images.decode(data, 60).max() == 0 and images.decode(data, 60, squash=True).max() == 255
        evaluation = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
        theirs = evaluation(Image.fromarray(turned))
        assert (theirs.float() - images.decode(data, 224, resize=256).float()).abs().mean() < 0.5
    data = encode(smooth(600, 900), "jpeg")
    middle = images.decode(data)[:, :, 150:750]
    assert (v2.functional.resize(middle, [30, 30]).float() - images.decode(data, 30).float()).abs().mean() < 6


def test_a_jpeg_that_is_cut_off_is_an_error_at_any_size_where_it_is_one_in_full():
    data, outcomes = encode(smooth(300, 300), "jpeg", quality=95), set()
    spoilt = [data[:3] + b"\0" + data[4:], *(data[:2] + more for more in (bytes(200) + data[2:], b"\xff" * 500))]
    for part in *spoilt, *(data[:length] for length in [*range(0, 700, 3), *range(700, len(data), 500)]):
        answers = set()
        for size in None, 30:
            try:
                answers.add(images.decode(part, size=size).ndim)
            except ValueError:
                answers.add("no image")
        assert len(answers) == 1
        outcomes |= answers
    assert outcomes == {"no image", 3}

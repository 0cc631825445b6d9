"""The networks of 02: by name, from scratch and pretrained, saved and loaded; and what 03 predicts with them."""

import csv
import hashlib
import io
import os
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pytest
import torch
from nbconvert.filters import markdown2html
from torchvision import models

from executed import execute
from helpers import experiment, images, storage
from helpers.chapters import cnn
from servers.embedded import connected

PHOTOS = Path(os.environ.get("PHOTOS_ZIP", storage.REPOSITORY.parent / "shared/datasets/photos5.zip"))
NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3}
DOTS, STRIPES = "<img src=x onerror=alert(1)>", "[a](javascript:b) | *c*"  # as whoever made the zip may call them


def picture(name, number, kind=".png", shape=(32, 40, 3)):
    """A picture of dots or stripes in noise, encoded."""
    pixels = np.random.default_rng(number).integers(0, 80, shape, np.uint8)
    pixels[::8] += 170
    if name == DOTS:
        pixels[:, ::2] //= 8
        pixels[:, 1::4] //= 8
    return cv2.imencode(kind, pixels)[1].tobytes()


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """A bucket with pictures of two classes, which nobody can confuse."""
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("pictures")
        for part, count in ("train", 12), ("val", 4), ("test", 12):
            for number in range(count):
                name = (DOTS, STRIPES)[number % 2]
                storage.write(f"s3://pictures/textures/{part}/{name}/{number}.png", picture(name, number))
        yield


def read(part, config, batch_size=4, dataset="textures"):
    decode, transform = cnn.preprocess(config)
    return images.loader(images.S3ImageFolder(f"s3://pictures/{dataset}/{part}", transform, loader=decode), batch_size)


@pytest.mark.parametrize("architecture, size", [("small_cnn", 16), ("squeezenet1_1", 32), ("googlenet", 32)])
def test_a_model_comes_back_with_the_same_outputs_and_is_a_pretrained_one_for_other_classes(architecture, size):
    model, inputs, url = cnn.build(architecture, 3, size), torch.rand(4, 3, size, size), "s3://pictures/models/saved"
    assert model(inputs).shape == (4, 3), "also in training mode"  # and the batch norms have some statistics now
    config = {"architecture": architecture, "classes": ["a", "b", "c"], "image_size": size, **NORMAL}
    experiment.save_model(model, url, **config)
    loaded, loaded_config = cnn.load_model(url)
    assert loaded_config == config and not loaded.training
    assert torch.equal(loaded(inputs), model.eval()(inputs))

    state, config = experiment.load_model(url)
    new, new_config = cnn.load_pretrained(architecture, 2, state, config)
    assert new_config["image_size"] == size and new(inputs).shape == (4, 2)
    head = cnn.find_head(new)
    assert all(torch.equal(part, state[name]) for name, part in new.state_dict().items() if not name.startswith(head))
    with pytest.raises(ValueError, match=f"{architecture}, not resnet18"):
        cnn.load_pretrained("resnet18", 2, state, config)


def test_a_vision_transformer_is_built_for_its_images_and_what_is_not_there_is_an_error_that_names_the_way_out():
    with torch.device("meta"):  # without the 86 million numbers
        assert cnn.build("vit_b_16", 3, 64)(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    for name in "vgg", "maskrcnn_resnet50_fpn":  # one that torchvision lacks, one that detects
        with pytest.raises(ValueError, match=f"'{name}'.*small_cnn.*efficientnet_lite0.*densenet201.*resnet18"):
            cnn.build(name, 7)
    with pytest.raises(storage.NotFound, match="s3://pictures/models/none.*notebook 02"):
        cnn.load_model("s3://pictures/models/none")


def test_the_head_is_trained_on_the_pretrained_body_then_all_of_it_without_its_batch_norms():
    state, config = cnn.imagenet_weights("efficientnet_lite0", "pictures")
    torch.manual_seed(0)
    model, config = cnn.load_pretrained("efficientnet_lite0", 2, state, config, image_size=56)
    assert (config["image_size"], config["resize"]) == (56, 64), "in the proportion of the weights' 224 and 256"
    history = cnn.train_head(model, read("train", config), read("test", config), epochs=40)
    assert history[-1]["val_accuracy"] == 1
    head, before = cnn.find_head(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    assert all(torch.equal(before[name], state[name]) for name in state if not name.startswith(head))

    loop = cnn.make_loop(model, read("train", config), read("test", config), 1, 0.001, 0.0001)
    assert loop.evaluate(loop.val_loader)["accuracy"] == 1, "the trained head is the network's"
    loop.fit(1)
    moved = {name: (weight.cpu() - before[name]).abs().max() for name, weight in model.state_dict().items()}
    assert moved[f"{head}.weight"] > 3 * moved["_conv_stem.weight"] > 0, "both learn, the body with the lower rate"
    assert not any(moved[name] for name in moved if "running" in name)


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no {PHOTOS.name}: set PHOTOS_ZIP to a zip of real photos to run this")
def test_ten_real_photos_a_class_are_enough_for_a_new_head():
    with zipfile.ZipFile(PHOTOS) as photos, ThreadPoolExecutor(32) as pool:
        for name in photos.namelist():
            _, label, file = name.split("/")
            part, number = file.removesuffix(".jpg").split("_")
            if int(number) < (10 if part == "train" else 30):
                pool.submit(storage.write, f"s3://pictures/photos/{part}/{label}/{file}", photos.read(name))
    torch.manual_seed(0)
    weights = cnn.imagenet_weights("efficientnet_lite0", "pictures")
    model, config = cnn.load_pretrained("efficientnet_lite0", 5, *weights, 112)
    history = cnn.train_head(model, read("train", config, 64, "photos"), read("test", config, 64, "photos"))
    assert history[-1]["val_accuracy"] >= 0.6, "0.73 is usual"


def test_imagenets_weights_come_from_the_network_then_the_bucket_and_offline_it_is_one_sentence(
    tmp_path, monkeypatch, moto_env, bucket
):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    state, data, offered = models.squeezenet1_1().state_dict(), io.BytesIO(), models.SqueezeNet1_1_Weights.DEFAULT.value
    torch.save(state, data)
    name = f"squeezenet1_1-{hashlib.sha256(data.getvalue()).hexdigest()[:8]}.pth"
    with connected(moto_env):
        storage.create_bucket(bucket)
        storage.client().put_object(Bucket=bucket, Key=name, Body=data.getvalue(), ACL="public-read")
    kept, find = (
        "s3://pictures/models/imagenet/squeezenet1_1",
        lambda: cnn.imagenet_weights("squeezenet1_1", "pictures"),
    )
    monkeypatch.setitem(vars(offered), "url", f"{moto_env['AWS_ENDPOINT_URL']}/{bucket}/{name}")
    first, _ = find()
    storage.delete(kept)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers: torch would wait for ever
        monkeypatch.setitem(vars(offered), "url", f"http://127.0.0.1:{silent.getsockname()[1]}/{name}")
        second, _ = find()  # torch's cache has them
        (tmp_path / "checkpoints" / name).unlink()
        third, config = find()  # and then the bucket
        storage.delete(kept)
        with pytest.raises(storage.StorageError, match="squeezenet1_1.*in the bucket.*cannot be reached.*notebook 02"):
            find()
    assert all(torch.equal(state[name], weights[name]) for weights in (first, second, third) for name in state)
    assert (config["image_size"], config["resize"]) == (224, 256) and config["mean"] == [0.485, 0.456, 0.406]


# ------------------------------------------------------------------------------------------------------- notebooks


def test_02_fine_tunes_and_03_predicts_any_picture_and_class_names_that_are_html_stay_text(tmp_path):
    data = dict(bucket="pictures", dataset="textures")
    network = dict(architecture="efficientnet_lite0", pretrained="imagenet", image_size=56, transfer_size=56)
    results = execute("02", tmp_path, epochs=1, **data, **network)
    pretrained = {f"{way}_accuracy_{count}" for way in ("frozen", "finetuned") for count in (10, 40)}
    assert {results[name] for name in ("val_accuracy", *pretrained)} == {1}

    folder = tmp_path / "mine"
    expected = {f"{folder}/1.jpg": DOTS, f"{folder}/sub/2": STRIPES, "s3://pictures/one.png": STRIPES}
    storage.write(f"{folder}/1.jpg", picture(DOTS, 201, ".jpg", (32, 90, 3)))
    storage.write(f"{folder}/sub/2", picture(STRIPES, 202, ".webp"))
    storage.write("s3://pictures/one.png", picture(STRIPES, 203, shape=(32, 40)))  # grey
    storage.write(f"{folder}/notes.txt", b"no picture")
    results = execute("03", tmp_path, image_url=f"{folder}, s3://pictures/one.png", **data)
    assert (results["test_accuracy"], results["pictures"], results["pictures_left_out"]) == (1, 3, 1)
    rows = list(csv.DictReader(io.StringIO(storage.read(f"{results['run']}/predictions.csv").decode())))
    assert {row["image"]: row["class_1"] for row in rows if not row["true"]} == expected
    assert sum(row["true"] == row["class_1"] for row in rows) == 12
    assert {"plots/pictures.png", "plots/occlusion.png"} <= {*storage.list_files(results["run"])}

    [page] = tmp_path.glob("*/03*.ipynb")
    assert "notes.txt: not an image" in page.read_text()
    outputs = [output for cell in nbformat.read(page, 4).cells for output in cell.get("outputs", ())]
    html = markdown2html("\n\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs))
    assert "<img" not in html and "<a" not in html and "<em>" not in html
    assert all(html.count(f">{escape(name, quote=False)}</td>") > 1 for name in (DOTS, STRIPES)), html

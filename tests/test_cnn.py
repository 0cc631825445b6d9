"""The networks of 02: by name, from scratch and pretrained, saved and loaded; and what 03 predicts with them."""

import contextlib
import csv
import functools
import hashlib
import http.server
import io
import os
import re
import socket
import threading
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


def picture(name, number, kind=".png", shape=(32, 40, 3)):
    """A picture of dots or stripes in noise, encoded."""
    pixels = np.random.default_rng(number).integers(0, 80, shape, np.uint8)
    pixels[::8] += 170
    if name == "dots":
        pixels[:, ::2] //= 8
        pixels[:, 1::4] //= 8
    return cv2.imencode(kind, pixels)[1].tobytes()


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """A bucket with pictures of two classes, which nobody can confuse."""
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("pictures")
        for part in "train", "test":
            for number in range(12):
                name = ("dots", "stripes")[number % 2]
                storage.write(f"s3://pictures/textures/{part}/{name}/{number}.png", picture(name, number))
        yield


def read(part, config, batch_size=4, dataset="textures"):
    decode, transform = cnn.preprocess(config)
    return images.loader(images.S3ImageFolder(f"s3://pictures/{dataset}/{part}", transform, loader=decode), batch_size)


@pytest.mark.parametrize("architecture, size", [("small_cnn", 16), ("squeezenet1_1", 32), ("googlenet", 32)])
def test_a_model_trains_and_comes_back_with_the_same_outputs_and_ready_to_predict(architecture, size):
    model, inputs = cnn.build(architecture, 3, size), torch.rand(4, 3, size, size)
    assert model(inputs).shape == (4, 3), "also in training mode"  # and the batch norms have some statistics now
    assert len(model.get_submodule(cnn.find_head(model)).bias) == 3
    config = {"architecture": architecture, "classes": ["a", "b", "c"], "image_size": size, **NORMAL}
    experiment.save_model(model, f"s3://pictures/models/{architecture}", **config)
    loaded, loaded_config = cnn.load_model(f"s3://pictures/models/{architecture}")
    assert loaded_config == config and not loaded.training
    assert torch.equal(loaded(inputs), model.eval()(inputs))


def test_a_vision_transformer_is_built_for_its_images_and_what_is_not_there_is_an_error_that_names_the_way_out():
    with torch.device("meta"):  # without the 86 million numbers
        assert cnn.build("vit_b_16", 3, 64)(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    for name in "vgg", "maskrcnn_resnet50_fpn":  # one that torchvision lacks, one that detects
        with pytest.raises(ValueError, match=f"'{name}'.*small_cnn.*efficientnet_lite0.*densenet201.*resnet18"):
            cnn.build(name, 7)
    with pytest.raises(storage.NotFound, match="s3://pictures/models/none.*notebook 02"):
        cnn.load_model("s3://pictures/models/none")


# ---------------------------------------------------------------------------------------------- pretrained weights


def test_the_head_is_trained_on_the_pretrained_body_then_all_of_it_without_its_batch_norms():
    state, config = cnn.imagenet_weights("efficientnet_lite0", "pictures")
    torch.manual_seed(0)
    model, config = cnn.load_pretrained("efficientnet_lite0", 2, state, config, image_size=56)
    assert (config["image_size"], config["resize"]) == (56, 64), "in the proportion of the weights' 224 and 256"
    history = cnn.train_head(model, read("train", config), read("test", config), epochs=40)
    assert history[-1]["val_accuracy"] == 1
    own, head = model.state_dict(), cnn.find_head(model)
    assert all(torch.equal(own[name], state[name]) for name in state if not name.startswith(head))

    loop = cnn.make_loop(model, read("train", config), read("test", config), 1, 0.001, 0.0001)
    assert loop.evaluate(loop.val_loader)["accuracy"] == 1, "the trained head is the network's"
    head_before, body_before = own[f"{head}.weight"].clone(), own["_conv_stem.weight"].clone()
    loop.fit(1)
    now = {name: weight.cpu() for name, weight in model.state_dict().items()}
    moved_head = (now[f"{head}.weight"] - head_before).abs().max()
    moved_body = (now["_conv_stem.weight"] - body_before).abs().max()
    assert moved_head > 3 * moved_body > 0, "both learn, the body with the lower rate"
    assert all(torch.equal(now[name], state[name]) for name in now if "running" in name)


def test_a_saved_model_is_a_pretrained_one_for_other_classes_but_not_for_another_architecture():
    url = "s3://pictures/models/source"
    model = cnn.small_cnn(5)
    experiment.save_model(model, url, architecture="small_cnn", classes=list("abcde"), image_size=48, **NORMAL)
    new, config = cnn.load_pretrained("small_cnn", 2, *experiment.load_model(url))
    assert config["image_size"] == 48 and new(torch.rand(2, 3, 48, 48)).shape == (2, 2)
    assert torch.equal(new[0][0].weight, model[0][0].weight)
    with pytest.raises(ValueError, match="small_cnn, not resnet18"):
        cnn.load_pretrained("resnet18", 2, *experiment.load_model(url))


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no {PHOTOS.name}: set PHOTOS_ZIP to a zip of real photos to run this")
def test_ten_real_photos_a_class_are_enough_for_a_new_head():
    with zipfile.ZipFile(PHOTOS) as photos, ThreadPoolExecutor(32) as pool:
        for name in (names := [name for name in photos.namelist() if name.endswith(".jpg")]):
            part, label = name.split("/")[-1], name.split("/")[-2]
            number = int(re.search(r"\d+", part)[0])
            for folder, wanted in ("ten", "train" in part and number < 10), ("test", "test" in part):
                if wanted:
                    pool.submit(storage.write, f"s3://pictures/photos/{folder}/{label}/{part}", photos.read(name))
    torch.manual_seed(0)
    weights = cnn.imagenet_weights("efficientnet_lite0", "pictures")
    model, config = cnn.load_pretrained("efficientnet_lite0", 5, *weights, 112)
    history = cnn.train_head(model, read("ten", config, 64, "photos"), read("test", config, 64, "photos"))
    assert len(names) == 1800 and history[-1]["val_accuracy"] >= 0.6, "0.73 is usual"


@contextlib.contextmanager
def serve_weights(folder, monkeypatch):
    """A web server in the place of torchvision's, which has the weights of a resnet18; yields their tensors."""
    state, data = models.resnet18().state_dict(), io.BytesIO()
    torch.save(state, data)
    name = f"resnet18-{hashlib.sha256(data.getvalue()).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(data.getvalue())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        redirect(monkeypatch, f"http://127.0.0.1:{server.server_port}/{name}")
        yield state
        server.shutdown()


def redirect(monkeypatch, url):
    weights = models.ResNet18_Weights.DEFAULT
    monkeypatch.setitem(vars(weights.value), "url", url)


def test_imagenets_weights_come_from_the_network_then_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "site").mkdir()
    with serve_weights(tmp_path / "site", monkeypatch) as state:
        first, _ = cnn.imagenet_weights("resnet18", "pictures")
        [cached] = (tmp_path / "hub/checkpoints").iterdir()
    storage.delete("s3://pictures/models/imagenet/resnet18")
    second, _ = cnn.imagenet_weights("resnet18", "pictures")  # the server is gone, torch's cache has them
    cached.unlink()
    third, config = cnn.imagenet_weights("resnet18", "pictures")  # and then the bucket
    assert all(torch.equal(state[name], weights[name]) for weights in (first, second, third) for name in state)
    assert (config["image_size"], config["resize"]) == (224, 256) and config["mean"] == [0.485, 0.456, 0.406]
    storage.delete("s3://pictures/models/imagenet/resnet18")


def test_offline_the_weights_are_one_sentence_and_no_long_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers: torch would wait for ever
        redirect(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-00000000.pth")
        with pytest.raises(storage.StorageError, match="resnet18.*in the bucket.*cannot be reached.*notebook 02"):
            cnn.imagenet_weights("resnet18", "pictures")


# ------------------------------------------------------------------------------------------------------- notebooks


def test_02_fine_tunes_and_03_predicts_any_picture(tmp_path):
    for number in range(4):
        name = ("dots", "stripes")[number % 2]
        storage.write(f"s3://pictures/textures/val/{name}/{number}.png", picture(name, 100 + number))
    data = dict(bucket="pictures", dataset="textures")
    network = dict(architecture="efficientnet_lite0", pretrained="imagenet", image_size=56, transfer_size=56)
    results = execute("02", tmp_path, epochs=1, **data, **network)
    pretrained = {f"{way}_accuracy_{count}" for way in ("frozen", "finetuned") for count in (10, 40)}
    assert {results[name] for name in ("val_accuracy", *pretrained)} == {1}
    assert 0 <= results["scratch_accuracy_10"] <= 1 and 0 <= results["scratch_accuracy_40"] <= 1

    folder = tmp_path / "mine"
    expected = {f"{folder}/1.jpg": "dots", f"{folder}/sub/2": "stripes", "s3://pictures/one.png": "stripes"}
    storage.write(f"{folder}/1.jpg", picture("dots", 201, ".jpg", (32, 90, 3)))
    storage.write(f"{folder}/sub/2", picture("stripes", 202, ".webp"))
    storage.write("s3://pictures/one.png", picture("stripes", 203, shape=(32, 40)))  # grey
    storage.write(f"{folder}/notes.txt", b"no picture")
    results = execute("03", tmp_path, image_url=f"{folder}, s3://pictures/one.png", **data)
    assert (results["test_accuracy"], results["pictures"], results["pictures_left_out"]) == (1, 3, 1)
    [page] = tmp_path.glob("*/03*.ipynb")
    assert "notes.txt: not an image" in page.read_text()
    rows = list(csv.DictReader(io.StringIO(storage.read(f"{results['run']}/predictions.csv").decode())))
    assert {row["image"]: row["class_1"] for row in rows if not row["true"]} == expected
    assert sum(row["true"] == row["class_1"] for row in rows) == 12
    assert {"plots/pictures.png", "plots/occlusion.png"} <= {*storage.list_files(results["run"])}


def test_a_class_name_that_is_html_stays_text_in_the_table_of_03():
    names = ["<img src=x onerror=alert(1)>", "[a](javascript:b) | *c*", "leaf_spot"]
    page = nbformat.read(storage.REPOSITORY / "notebooks/03_inference_from_s3.ipynb", 4)
    cells = [cell.source for cell in page.cells if "| class |" in cell.source or cell.source.startswith("import")]
    numbers = torch.arange(3)
    made = {"classes": names, "predictions": numbers, "targets": numbers, "count": {"num_classes": 3}}
    exec("\n".join(cells).replace("Markdown(table)", "shown = Markdown(table)"), made)
    html = markdown2html(made["shown"].data)
    assert "<img" not in html and "<a" not in html and "<em>" not in html
    assert re.findall("<td[^>]*>(.*?)</td>", html)[::5] == [escape(name, quote=False) for name in names]

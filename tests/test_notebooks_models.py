"""The notebooks of language models, of many processes and of speed, executed with papermill as a user does."""

import json
import os

import chitchat_dataset
import cv2
import pytest

from helpers import experiment, storage
from helpers.chapters import bench, zips
from helpers.chapters.dialogues import Dialogues
from cells import run_cells
from executed import execute
from test_run import write


def test_04_learns_from_a_few_pairs_and_finds_replies(embedded, tmp_path, bucket, monkeypatch):
    """With the beginnings of some conversations, which are written to the bucket once, with their older turns."""
    some, url = dict(list(chitchat_dataset.Dataset().items())[::2]), f"s3://{bucket}/dialogues/chitchat"
    some = {thread: talk | {"messages": talk["messages"][:5]} for thread, talk in some.items()}
    monkeypatch.setattr(chitchat_dataset, "Dataset", lambda: some)
    storage.create_bucket(bucket)
    names = dict(dialogues="chitchat", bucket=bucket, parameters={}, experiment=experiment)
    run_cells("04b", "def make_records", "def put_dialogues", names=names)
    written, pairs = storage.objects(url), list(Dialogues(url))
    assert len(written) == 8 and {pair["thread"] for pair in pairs} <= {*some}
    assert len(pairs) > 4_000 and sum(len(pair["turns"]) > 1 for pair in pairs) > 0.7 * len(pairs)
    options = dict(few_pairs=180, pairs=3000, model_size="tiny", full_pairs=256, held_out_pairs=200, batch_size=128)
    results = execute("04", tmp_path, bucket=bucket, curve="", draws=1, benchmark="tiny", few_epochs=2, **options)
    assert results["pairs"] == 3000 and storage.objects(url) == written and results["model_bytes"] < 4e6
    assert results["loss_after"] < results["loss_before"] - 0.3
    assert results["known_recall_after"] > results["known_recall_before"] + 0.1 > 0.11, "chance is 0.01"
    assert results["recall_at_1_of_100"] >= 0.06, "chance is 0.01"
    assert min(results["multi_context_mrr"], results["mrr"]) > 0.12, "chance is 0.05"
    assert abs(results["recall_at_1_of_100"] - results["quantized_recall_at_1_of_100"]) <= 0.01
    assert 0.04 < results["tfidf_recall_at_1_of_100"] < 0.3 and results["pairs_per_second"] > 0
    assert results["padding_free_speedup"] > 1 and results["padding_free_loss_difference"] < 1e-4


def test_05_to_07_train_look_and_tell_in_one_bucket(embedded, tmp_path, bucket):
    extra, table = tmp_path / "extra.txt", tmp_path / "some.csv"
    extra.write_text("Ladies and gentlemen, thank you for coming tonight. " * 10)
    lines = (storage.REPOSITORY / "data_samples/jokes.csv").read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[:101], "101,Too few fields\n"]))
    given = dict(jokes_csv=str(table), epochs=1, max_length=32, batch_size=8, learning_rate=0.002, sample_size=8)
    given |= dict(extra_text=str(extra), base_model="minilm", base_models="small")
    results = execute("05", tmp_path, bucket=bucket, **given)
    assert (results["jokes_kept"], results["jokes_dropped"]) == (100, 1) and results["jokes_too_long"] > 0
    assert results["perplexity_after"] < results["perplexity_before"] / 4 and results["tokens_per_second"] > 0
    assert 0 < results["distinct_2"] <= 1 and results["copied_share"] < 0.5 and results["base_model"] == "minilm"
    small, minilm = (row["bits_per_character"] for row in results["models"])
    assert minilm < small - 0.3, "real weights know English"
    assert {"models/jokes/config.json", "models/jokes/model.safetensors"} <= storage.objects(f"s3://{bucket}").keys()

    url, votes = f"s3://{bucket}/models/jokes-small", f"sqlite:///{tmp_path}/votes.db"
    results = execute("07", tmp_path, bucket=bucket, model_urls=url, model_url=url, database_url=votes, requests=60)
    assert results["jokes_served"] == 60 and 0 < results["p50_seconds"] <= results["p95_seconds"]
    assert results["batched_speedup"] > 0
    assert results["votes"] == results["votes_whole"] == results["votes_answers"] == 0
    assert (results["jokes_told"], results["votes_counted"], results["calls_repeated"]) == (1, 1, 2), "on Telegram"

    missing = f"s3://{bucket}/models/not-there"  # which it goes on without
    results = execute("06", tmp_path, bucket=bucket, examples=10, epochs=4, gpt2_url=url, convert_url=missing)
    assert results["alignment_accuracy"] >= 0.9 and results["seconds_per_heatmap"] > 0
    assert results["heatmaps"] == 10 + 4 * 4 + 2  # and the rollout of two jokes
    assert {"plots/joke.png", "dates.html"} <= storage.objects(results["run_url"]).keys()


OWN = (  # with the parameters of 02
    "#parameters\nbucket = ''\nepochs = 3\nbatch_size = 32\nseed = 0\nmodel_url = ''\ntransfer = ''",
    """
from helpers import experiment, storage
storage.connect()
experiment.Run(f"s3://{bucket}/runs/train", epochs=epochs).finish({})""",
)


@pytest.mark.parametrize("page", ["", pytest.param("02_train_cnn_from_s3.ipynb", marks=pytest.mark.slow)])
def test_09_trains_on_two_processes_and_rents_a_machine(page, embedded, tmp_path, bucket, every):
    storage.create_bucket(bucket)
    zips.unzip(every(3), f"s3://{bucket}/leaves")
    zips.split_classes(f"s3://{bucket}/leaves")
    notebook = page or str(write(tmp_path, "own.ipynb", *OWN))
    results = execute("09", tmp_path, bucket=bucket, notebook=notebook, batch_size=70)  # of 140: shares are equal
    assert results["processes"] == 2 and results["max_abs_weight_difference"] < 1e-5
    assert results["throughput_ratio"] > 0 and results["submitted_instance_state"] in ("pending", "running")
    names = [name.split("/", 3)[2:] for name in storage.objects(f"s3://{bucket}") if name.startswith("runs/train")]
    assert len({time for time, _ in names}) == 1, "two processes leave one run"
    assert {"manifest.json", "metrics.json"} <= {rest for _, rest in names}


def test_10_and_11_measure_what_they_say_side_by_side(embedded, tmp_path, bucket):
    before = dict(os.environ)
    results = execute("10", tmp_path, bucket=bucket, loader_images=64, loader_seconds=0.01, scaling=1000, delay=0.001)
    shares = ["least_share_of_the_limit", "epoch_over_longer_of_fetch_and_compute", "cached_epoch_over_local_files"]
    for name in ["boto3 loop, at once", "boto3 loop, 1 ms", *shares]:
        assert results[name] > 0.1, f"{name}: a tenth of what it is, even at these sizes, or less"
    assert json.loads(storage.read(f"{results['run']}/rounds.json"))["machine"]["cores"]
    bench.draw(f"{results['run']}/rounds.json", tmp_path / "chart.png")
    assert cv2.imread(str(tmp_path / "chart.png")).shape[1] > 800, "four panels side by side"
    rows = bench.gather(next(tmp_path.glob("*/10_*.ipynb")).parent).splitlines()[1:]
    assert f"{results['bytes_an_object']:,}" in [row.split()[-1] for row in rows]

    packed = execute("11", tmp_path, bucket=bucket, packed_images=64, delay=0.001)
    assert packed["packed_over_webdataset"] > 0.1
    gets, million = packed["gets"], packed["cost"][-1]
    assert gets["loose"] == [64, 64] and gets["loose, cached on disk"] == [64, 0]
    assert max(gets["packed"] + gets["packed, in blocks"]) <= 3, "the index and the one shard, then nothing"
    assert million["packed, fully random, $ a million"] > 0.3, "of a million images few lie side by side"
    assert million["packed, in blocks, $ a million"] < 0.005 and million["loose, $ a million"] == 0.4
    assert {"plots/packed.png", "plots/requests.png", "rounds.json"} <= storage.objects(packed["run"]).keys()
    assert "images" not in storage.buckets() and dict(os.environ) == before, "they measure on a server of their own"

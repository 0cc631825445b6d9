"""The notebooks of language models, of many processes and of speed, executed with papermill as a user does."""

import json
import os
from importlib.util import find_spec

import cv2

from helpers import storage
from helpers.chapters import bench
from executed import execute


def test_04_finds_replies(embedded, tmp_path, bucket):
    results = execute(
        "04", tmp_path, bucket=bucket, pairs=6000, full_pairs=1000, batch_size=256, curve="", benchmark="tiny"
    )
    assert results["recall_at_1_of_100"] >= 0.12 and results["multi_context_mrr"] > results["mrr"] > 0.18
    assert abs(results["recall_at_1_of_100"] - results["quantized_recall_at_1_of_100"]) <= 0.01
    assert 0.1 < results["tfidf_recall_at_1_of_100"] < 0.3 and results["pairs"] == 6000
    assert results["padding_free_speedup"] > 1 and results["padding_free_loss_difference"] < 1e-4
    assert results["model_bytes"] < 11e6 and results["pairs_per_second"] > 0


def test_05_to_07_train_look_and_tell_in_one_bucket(embedded, tmp_path, bucket):
    extra, votes = tmp_path / "extra.txt", f"sqlite:///{tmp_path}/votes.db"
    extra.write_text("Ladies and gentlemen, thank you for coming tonight. " * 40)
    results = execute(
        "05 07",
        tmp_path,
        bucket=bucket,
        epochs=2,
        base_model="minilm",
        base_models="small",
        extra_text=str(extra),
        database_url=votes,
        requests=60,
        benchmark=True,
    )
    assert results["perplexity_after"] < results["perplexity_before"] / 4
    assert results["jokes_kept"] > 450 and results["jokes_dropped"] >= 0 and results["copied_share"] < 0.5
    assert 0 < results["distinct_2"] <= 1 and results["tokens_per_second"] > 0 and results["base_model"] == "minilm"
    small, minilm = (row["bits_per_character"] for row in results["models"])
    assert minilm < small - 0.3, "real weights know English"
    assert {"models/jokes/config.json", "models/jokes/model.safetensors"} <= storage.objects(f"s3://{bucket}").keys()
    assert results["jokes_served"] == 60 and 0 < results["p50_seconds"] <= results["p95_seconds"]
    assert results["batched_speedup"] > 0 and results["votes"] == 0
    assert results["votes_whole"] == results["votes_answers"] == 0

    assert results["packing_speedup"] > 1
    missing = f"s3://{bucket}/models/not-there"  # which it goes on without
    results = execute("06", tmp_path, bucket=bucket, examples=10, epochs=5, convert_url=missing)
    assert (
        results["alignment_accuracy"] >= 0.9 and results["heatmaps"] == 10 + 4 * 5 + 2
    )  # and the rollout of two jokes
    assert results["seconds_per_heatmap"] > 0
    assert {"plots/joke.png", "dates.html"} <= storage.objects(results["run_url"]).keys()


def test_09_trains_on_two_processes_and_rents_a_machine(embedded, tmp_path, bucket):
    results = execute("01 09", tmp_path, bucket=bucket)
    assert results["processes"] == 2 and results["max_abs_weight_difference"] < 1e-5
    assert results["throughput_ratio"] > 0 and results["submitted_instance_state"] in ("pending", "running")


def test_10_and_11_measure_what_they_say_side_by_side(embedded, tmp_path, bucket):
    before = dict(os.environ)
    results = execute("10", tmp_path, bucket=bucket, loader_images=64, loader_seconds=0.01, scaling=1000, delay=0.001)
    peers = [f"{name}, at once" for name in ("s3torchconnector",) if find_spec(name)]  # make bench installs it
    for name in (
        "boto3 loop, at once",
        "boto3 loop, 1 ms",
        "least_share_of_the_limit",
        "epoch_over_longer_of_fetch_and_compute",
        "cached_epoch_over_local_files",
        *peers,
    ):
        assert results[name] > 0.1, f"{name}: a tenth of what it is, even at these sizes, or less"
    kept = json.loads(storage.read(f"{results['run']}/rounds.json"))
    assert kept["machine"]["cores"] and {"boto3 loop", "local files", "S3ImageFolder"} <= {
        row["contender"] for row in kept["rounds"]
    }
    bench.draw(f"{results['run']}/rounds.json", tmp_path / "chart.png")
    assert cv2.imread(str(tmp_path / "chart.png")).shape[1] > 800, "four panels side by side"

    packed = execute("11", tmp_path, bucket=bucket, packed_images=64, delay=0.001)
    for name in ("webdataset", *filter(find_spec, ["litdata"])):
        assert packed[f"packed_over_{name}"] > 0.1, name
    gets = packed["gets"]
    assert gets["loose"] == [64, 64] and gets["loose, cached on disk"] == [64, 0]
    assert max(gets["packed"] + gets["packed, in blocks"]) <= 3, "the index and the one shard, then nothing"
    million = packed["cost"][-1]
    assert million["packed, fully random, $ a million"] > 0.3, "of a million images few lie side by side"
    assert million["packed, in blocks, $ a million"] < 0.005 and million["loose, $ a million"] == 0.4
    assert {"plots/packed.png", "plots/requests.png", "rounds.json"} <= storage.objects(packed["run"]).keys()
    assert "images" not in storage.buckets() and dict(os.environ) == before, "they measure on a server of their own"

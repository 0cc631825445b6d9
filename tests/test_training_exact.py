"""What TrainLoop trains is exactly what plain PyTorch would: for all kinds of models, when killed, on two processes."""

import copy
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import storage, training
from helpers.callbacks import Checkpoint, state_from_safetensors, state_to_safetensors
from helpers.chapters import zips
from helpers.training import TrainLoop
from loops import LAST, Call, Net, Pair, Rows, at, batches, cancel, fail, make_loop, on_two_processes, same, timeless


def test_a_model_of_transformers_trains_by_the_loss_it_returns():
    from transformers import GPT2Config, GPT2LMHeadModel  # here: the other processes do without

    tokens = torch.randint(50, (12, 7), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": row, "labels": row} for row in tokens], 4)
    sizes = dict(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    mine = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    plain = copy.deepcopy(mine).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            plain(**batch).loss.backward()
            optimizer.step()
    loop = TrainLoop(mine, batches, batches, optimizer=torch.optim.SGD(mine.parameters(), lr=0.1))
    history = loop.fit(2)
    assert same(mine, plain) and history[-1]["val_loss"] < history[0]["train_loss"]
    logits, targets = loop.predict(batches)
    assert logits.shape == (12, 7, 50) and torch.equal(targets, tokens)


def test_several_optimizers_train_as_in_a_plain_loop_each_by_its_own_loss_after_the_one_before():
    loop, plain = (make_loop((0.01, 0.02), kind=torch.optim.Adam) for _ in range(2))
    torch.manual_seed(1)
    for inputs, targets in plain.train_loader:
        for optimizer in plain.optimizers:
            plain.model.zero_grad()
            plain.criterion(plain.model(inputs), targets).backward()
            optimizer.step()
    torch.manual_seed(1)
    [row] = loop.fit(1)
    assert same(loop.model, plain.model)
    outputs, targets = loop.predict(batches(1))
    assert row["val_loss"] == pytest.approx(2 * plain.criterion(outputs, targets).item(), rel=1e-5)


def plain_loop(model, size=4, factor=1, count=40, **options):
    rows = Rows(count=count)
    rows.inputs *= factor
    return make_loop(model=model, train=DataLoader(rows, size), val=None, **options)


def test_accumulated_gradients_are_those_of_the_large_batch_and_a_number_of_steps_ends_within_an_epoch():
    model, large = nn.Linear(5, 3), nn.Linear(5, 3)
    loop = plain_loop(model, accumulate=4)
    assert len(loop.fit(num_steps=13)) == 2 and loop.steps == 13 and loop.stepped
    model.load_state_dict(large.state_dict())
    plain_loop(model, accumulate=4).fit(2)  # of 10 batches: the last group has two
    plain_loop(large, 16).fit(2)
    for one, other in zip(model.parameters(), large.parameters()):
        torch.testing.assert_close(one, other)


def test_bf16_trains_with_weights_in_full_precision():
    model, seen = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop = plain_loop(model, mixed_precision="bf16")
    loop.fit(1)
    assert set(seen) == {torch.bfloat16} and {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert loop.predict(batches())[0].dtype == torch.float32


def test_fp16_shows_gradients_unscaled_and_leaves_out_a_step_beyond_its_range_with_the_schedule():
    notes = Call(
        after_backward=lambda loop: norms.append(nn.utils.get_total_norm([w.grad for w in loop.weights]).item()),
        after_step=lambda loop: moves.append((loop.stepped, loop.scheduler.last_epoch)),
    )
    start, found = nn.Linear(5, 3), []
    for scale in None, 1024.0, 3e38:  # with the last one, gradients are beyond float32, as large ones are beyond fp16
        model, norms, moves = copy.deepcopy(start), [], []
        loop = plain_loop(model, factor=100, count=8)
        loop.scheduler = torch.optim.lr_scheduler.StepLR(*loop.optimizers, 1000)
        if scale:
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-9)
        loop.fit(1, [notes])
        found.append((model, norms))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] and not same(found[0][0], model)
    assert not math.isfinite(norms[0]) and moves == [(False, 0), (True, 1)]


def trainee(**options):
    """A loop with everything that has a state: dropout, batch norm, Adam, a schedule, a shuffled and augmented set."""
    options = {"train": batches(augmented=True, shuffle=True, generator=torch.Generator().manual_seed(5)), **options}
    metrics = {"accuracy": MulticlassAccuracy(3)}
    loop = make_loop((0.01,), batches(1, augmented=True), torch.optim.Adam, metrics=metrics, accumulate=2, **options)
    loop.scheduler = torch.optim.lr_scheduler.OneCycleLR(*loop.optimizers, 0.01, 4 * 3)
    return loop


def test_training_taken_up_at_any_step_ends_as_if_it_had_never_stopped(tmp_path):
    (whole := trainee()).fit(4)
    trainee().fit(4, [Checkpoint(str(tmp_path), every=1, keep=99)])
    for stop in 19, 15, 4, 2:  # in the last step of an epoch, at its end, and within, the last one first
        for path in tmp_path.glob("step_*"):
            if int(path.name.split("_")[1]) > stop:
                path.unlink()
        again, steps = trainee(), []
        torch.manual_seed(99)  # whatever was drawn before makes no difference
        note = Call(after_step=lambda loop: steps.append(loop.steps))
        again.fit(4, [Checkpoint(str(tmp_path), every="end", keep=99), note])
        assert steps == list(range(stop + 1, 21))
        assert same(again.model, whole.model) and timeless(again.history) == timeless(whole.history)


def test_an_error_within_a_step_leaves_nothing_that_changes_the_training_when_it_is_taken_up(tmp_path):
    (whole := trainee()).fit(2)
    broken = trainee()
    with pytest.raises(ZeroDivisionError):
        broken.fit(2, [Checkpoint(str(tmp_path), every=1), Call(after_backward=at(6, fail))])
    broken.history, broken.steps, broken.batch = [], 0, 0
    broken.fit(2, [Checkpoint(str(tmp_path), every=1)])
    assert same(broken.model, whole.model)


def die_while_writing(loop, folder):
    def write_half(path, data):
        path.open("wb", buffering=0).write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = write_half
    loop.steps += 1
    Checkpoint(folder).after_epoch(loop)


def test_a_checkpoint_cut_off_by_a_kill_or_damaged_is_passed_over_and_those_that_are_too_many_go(tmp_path):
    (loop := trainee()).fit(2, [Checkpoint(str(tmp_path), keep=3)])
    killed = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(loop, str(tmp_path)))
    killed.start()
    killed.join()
    *names, newest, partial = sorted(path.name for path in tmp_path.iterdir())
    assert killed.exitcode == -signal.SIGKILL and partial.startswith("step_000000011_") and len(names) == 1
    assert newest == "step_000000010_000000000.safetensors"
    (tmp_path / newest).write_bytes((tmp_path / newest).read_bytes()[:1000])
    again = trainee()
    assert len(again.fit(2, [Checkpoint(str(tmp_path), keep=3)])) == 2 and again.steps == 10  # from the one before
    assert same(again.model, loop.model)
    for epochs in 2, 3:  # with no step left, and with some
        trainee().fit(epochs, [Checkpoint(str(tmp_path), keep=1)])
        assert [path.name for path in tmp_path.glob("*.safetensors")] == [
            f"step_{5 * epochs:09d}_000000000.safetensors"
        ]


def test_only_the_random_state_of_ones_own_gpu_is_kept_and_training_goes_on_with_as_many_processes(monkeypatch):
    """As on a machine with two GPUs, one of which is this process's; it is continued on a machine without any."""
    own, loop, again = torch.arange(16, dtype=torch.uint8), trainee(), trainee()
    loop.fit(1)
    with monkeypatch.context() as two_gpus:
        two_gpus.setattr(torch.cuda, "get_rng_state", lambda *device: own)
        two_gpus.setattr(torch.cuda, "get_rng_state_all", lambda: [own, own])
        loop.random = training._random_sources(torch.device("cuda"), loop.train_loader, loop.val_loader)
        state = state_from_safetensors(state_to_safetensors(loop.state_dict()))
    assert torch.equal(state["processes"][0]["random"]["cuda"], own)
    del loop.random["cuda"]
    loop.fit(1)
    with pytest.raises(ValueError, match="begun with 2 processes and cannot go on with 1"):
        again.load_state_dict(state | {"processes": state["processes"] * 2})
    again.load_state_dict(state)
    again.fit(1)
    assert same(loop.model, again.model)


def test_any_state_is_packed_without_a_pickle():
    plain = {"a": [1, 2.5, None, "text", True, (1, (2, 3))], 4: {"inf": float("inf")}, "d": {}, "l": [], "u": ()}
    tensors = {"t": torch.arange(6).view(2, 3).T, "half": torch.rand(3).bfloat16(), "empty": torch.zeros(0)}
    tensors["scalar"] = torch.tensor(0.1)
    data = state_to_safetensors(plain | tensors)
    assert len(safetensors.torch.load(data)) == 5, "a plain safetensors file, which cannot hold code"
    with pytest.raises(TypeError, match="not JSON serializable"):
        state_to_safetensors({"object": torch.nn.ReLU()})
    again = state_from_safetensors(data)
    assert all(torch.equal(tensor, again.pop(name)) for name, tensor in tensors.items()) and again == plain


def test_two_processes_train_measure_and_go_on_as_one_with_twice_the_batch(tmp_path):
    train_and_measure(2, tmp_path / "1")
    on_two_processes(train_and_measure, 1, tmp_path / "2")
    weights, others = (load_file(tmp_path / count / "weights.safetensors") for count in "12")
    one, two = (json.loads((tmp_path / count / "done.json").read_text()) for count in "12")
    for name in weights:  # those with two optimizers, too
        torch.testing.assert_close(weights[name], others[name])
    assert one["row"] == pytest.approx(two["row"], rel=1e-5)
    assert one["moves"] == two["moves"] == 3 * 2  # of a scheduler given to TrainLoop; 4 batches, accumulated by two
    assert one["predicted"] == two["predicted"] == list(range(41))  # in the order of the loader
    assert one["drawn"] == two["drawn"] == list(range(44))  # each process its part
    assert one["again"] == two["again"] == {"3": True, "4": True, "5": True}  # in an epoch, after it, in the next one


def test_of_two_processes_the_first_changes_the_store_and_the_other_one_waits_for_it(tmp_path):
    environment = storage.serve(tmp_path / "s3")
    (tmp_path / "s3/old").mkdir()
    (tmp_path / "cats").mkdir()
    for i in range(10):
        (tmp_path / f"cats/{i}").write_bytes(b"x" * i)
    on_two_processes(change_store, str(tmp_path), **environment)
    for rank in "01":
        assert (tmp_path / f"seen-{rank}").read_text() == "10 {'train': 7, 'val': 2, 'test': 1} ['new']"


def change_store(folder):
    storage.connect()
    storage.create_bucket("new")
    storage.delete_bucket("old")
    put = zips.upload(f"{folder}/cats", "s3://new/pets/raw/cats")["uploaded"]
    counts = zips.split_classes("s3://new/pets")
    Path(f"{folder}/seen-{os.environ['RANK']}").write_text(f"{put} {counts} {storage.buckets()}")


def train_and_measure(factor, folder):
    def loader(data, size=4, **options):
        return DataLoader(data, size * factor, **options)

    torch.manual_seed(0)
    net, pair, metrics = Net(noise=False), Pair(noise=False), {"accuracy": MulticlassAccuracy(3)}
    train, val = loader(Rows(count=32)), loader(Rows(1, count=41))
    loop = make_loop(model=net, train=train, val=val, metrics=metrics, accumulate=2)
    loop.scheduler = torch.optim.lr_scheduler.StepLR(*loop.optimizers, 1000)
    row = timeless(loop.fit(3))[-1]
    make_loop((0.1, 0.2), model=pair, train=train, accumulate=2).fit(3)

    def one_of_two():
        loop = trainee(train=batches(augmented=True, shuffle=True))  # 5 batches, 3 of them here when there are two
        torch.manual_seed(100 + loop.accelerator.process_index)  # dropout and augmentation of its own
        return loop

    whole, again = one_of_two(), {}
    whole.fit(2)
    for stop in 3, 4, 5:
        url = f"{folder}/checkpoints_{stop}"
        one_of_two().fit(2, [Checkpoint(url, every=1), Call(LAST, after_step=at(stop, cancel))])
        resumed = one_of_two()
        resumed.fit(2, [Checkpoint(url, every=1)])
        equal = same(resumed.model, whole.model) and timeless(resumed.history) == timeless(whole.history)
        again[stop] = all(gather_object([equal]))

    rows = TensorDataset(Rows(count=41).inputs, torch.arange(41))
    predicted = TrainLoop(net).predict(loader(rows))[1].tolist()
    torch.manual_seed(loop.accelerator.process_index)
    shuffled = TrainLoop(net, loader(TensorDataset(torch.arange(44.0)), size=2, shuffle=True)).train_loader
    drawn = sorted(gather_object([index for (batch,) in shuffled for index in batch.tolist()]))
    if loop.accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        weights = net.state_dict() | {f"pair.{name}": weight for name, weight in pair.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        found = dict(row=row, again=again, drawn=drawn, moves=loop.scheduler.last_epoch, predicted=predicted)
        (folder / "done.json").write_text(json.dumps(found))
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()

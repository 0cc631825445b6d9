"""What TrainLoop trains is exactly what plain PyTorch would: for all kinds of models, when killed, on two processes."""

import contextlib
import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest
import safetensors.torch
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import storage, training
from helpers.chapters import zips
from helpers.callbacks import Checkpoint, state_from_safetensors, state_to_safetensors
from helpers.training import Callback, TrainLoop
from loops import LAST, Call, at, cancel, fail, same, timeless
from servers import free_port
from servers.fault_proxy import fault_proxy

pytestmark = pytest.mark.usefixtures("one_thread")

CRITERION = nn.CrossEntropyLoss()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count, seed=1):
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def test_a_model_of_transformers_trains_by_the_loss_it_returns():
    from transformers import GPT2Config, GPT2LMHeadModel  # here: the processes that are killed do without

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


class Adversaries(nn.Module):
    """A generator and a discriminator that train against each other, on rows of four numbers."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)

    def get_loss(self, batch, criterion):
        real, latent = batch
        fake = self.generator(latent)
        ones = torch.ones(len(real), 1)
        both = torch.cat([real, fake.detach()])
        yield criterion(self.discriminator(both), torch.cat([ones, 0 * ones]))
        yield criterion(self.discriminator(fake), ones)

    def get_predictions(self, batch):
        return self.generator(batch[1]), batch[0]


def test_two_adversaries_train_with_two_optimizers_as_in_a_plain_loop():
    data, criterion, mine = TensorDataset(noise(16, 4), noise(16, 2, seed=1)), nn.BCEWithLogitsLoss(), Adversaries()
    plain = copy.deepcopy(mine)

    def optimizers(model):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (model.discriminator, model.generator)]

    by_hand = optimizers(plain)
    for _ in range(3):
        for batch in DataLoader(data, 8):
            for number, optimizer in enumerate(by_hand):
                plain.zero_grad()
                list(plain.get_loss(batch, criterion))[number].backward()
                optimizer.step()
    loop = TrainLoop(mine, DataLoader(data, 8), DataLoader(data, 8), optimizer=optimizers(mine), criterion=criterion)
    loop.fit(3)
    assert same(mine, plain)
    assert loop.history[-1]["val_loss"] == pytest.approx(sum(mine.get_loss(data.tensors, criterion)).item(), rel=1e-5)
    assert loop.predict(DataLoader(data, 8))[0].shape == (16, 4)


def plain_loop(model, data, size=8, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainLoop(model, DataLoader(data, size), optimizer=optimizer, criterion=CRITERION, **options)


def test_accumulated_gradients_are_those_of_the_large_batch_and_a_number_of_steps_ends_within_an_epoch():
    data, model = TensorDataset(noise(40, 5), labels(40)), nn.Linear(5, 3)
    large = copy.deepcopy(model)
    loop = plain_loop(model, data, 4, accumulate=4)
    assert len(loop.fit(num_steps=13)) == 2 and loop.steps == 13 and loop.stepped
    model.load_state_dict(large.state_dict())
    plain_loop(model, data, 4, accumulate=4).fit(2)  # of 10 batches: the last group has two
    plain_loop(large, data, 16).fit(2)
    for one, other in zip(model.parameters(), large.parameters()):
        torch.testing.assert_close(one, other)


def test_only_the_random_state_of_ones_own_gpu_is_kept(monkeypatch):
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
    again.load_state_dict(state)
    again.fit(1)
    assert same(loop.model, again.model)


def test_bf16_trains_with_weights_in_full_precision():
    data, model, seen = TensorDataset(noise(16, 5), labels(16)), nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop = plain_loop(model, data, mixed_precision="bf16")
    loop.fit(1)
    assert set(seen) == {torch.bfloat16} and {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert loop.predict(DataLoader(data, 8))[0].dtype == torch.float32


def test_fp16_shows_gradients_unscaled_and_leaves_out_a_step_beyond_its_range_with_the_schedule():
    notes = Call(
        after_backward=lambda loop: norms.append(nn.utils.get_total_norm([w.grad for w in loop.weights]).item()),
        after_step=lambda loop: moves.append((loop.stepped, loop.scheduler.last_epoch)),
    )
    data, start, found = TensorDataset(100 * noise(16, 5), labels(16)), nn.Linear(5, 3), []
    for scale in None, 1024.0, 3e38:  # with the last one, gradients are beyond float32, as large ones are beyond fp16
        model, norms, moves = copy.deepcopy(start), [], []
        loop = plain_loop(model, data)
        loop.scheduler = torch.optim.lr_scheduler.StepLR(*loop.optimizers, 1000)
        if scale:
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-9)
        loop.fit(1, [notes])
        found.append((model, norms))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] and not same(found[0][0], model)
    assert not math.isfinite(norms[0]) and moves == [(False, 0), (True, 1)]


@pytest.fixture(scope="module")
def fork():
    """fork(environments, mode, *arguments): a process for each, which has everything imported; numbers and output."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, __file__], **pipes) as parent:

        def start(*job):
            print(json.dumps(job), file=parent.stdin, flush=True)
            return json.loads(parent.stdout.readline()), parent.stdout

        yield start
        parent.kill()


def codes(said):
    """How the processes ended, when all of them have."""
    return json.loads(next(line for line in said if line.startswith("[")))


class Augmented(Dataset):
    """Rows that are a little different each time, drawn from every random generator there is."""

    def __init__(self):
        self.rows, self.targets = noise(44, 5), labels(44)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] + 0.1 * torch.randn(5) + random.random(), self.targets[index]


def trainee(own_generator=True):
    """A loop with everything that has a state: dropout, batch norm, Adam, a schedule, a shuffled and augmented set."""
    random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5) if own_generator else None
    train, val = DataLoader(Augmented(), 4, shuffle=True, generator=generator), DataLoader(Augmented(), 8)
    schedule, metrics = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 4 * 6), {"accuracy": MulticlassAccuracy(3)}
    options = dict(optimizer=optimizer, criterion=CRITERION, scheduler=schedule, metrics=metrics)
    return TrainLoop(model, train, val, accumulate=2, **options)


class Steps(Callback):
    """Notes each step, before it is saved, and tells it."""

    def __init__(self):
        self.seen = []

    def after_step(self, loop):
        self.seen.append(loop.steps)
        os.write(1, b"step\n")


def test_training_taken_up_at_any_step_ends_as_if_it_had_never_stopped(tmp_path):
    whole = trainee()
    whole.fit(4)
    trainee().fit(4, [Checkpoint(str(tmp_path), every=1, keep=99)])
    for stop in 43, 33, 10, 2:  # within an epoch, in its last step and at its end, the last one first
        for path in tmp_path.glob("step_*"):
            if int(path.name.split("_")[1]) > stop:
                path.unlink()
        again = trainee()
        torch.manual_seed(99)  # whatever was drawn before makes no difference
        again.fit(4, [Checkpoint(str(tmp_path), every="end", keep=99), (steps := Steps())])
        assert steps.seen[0] == stop + 1 and len(steps.seen) == 44 - stop
        assert same(again.model, whole.model) and timeless(again.history) == timeless(whole.history)


def test_training_killed_again_and_again_ends_as_if_it_had_not(fork, tmp_path):
    whole = trainee()
    whole.fit(3)
    url, environment = "s3://killed/checkpoints", storage.serve(tmp_path / "s3")
    (tmp_path / "s3/killed").mkdir()
    for begun in 9, 14, 0:  # after so many steps it dies, most likely while the last one is being saved
        [number], said = fork([environment], "train", url, str(tmp_path))
        for _ in range(begun):
            assert said.readline() == "step\n"
        if begun:
            os.kill(number, signal.SIGKILL)
        assert codes(said) == [-signal.SIGKILL if begun else 0]
    weights = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.model.state_dict().items())
    assert json.loads((tmp_path / "history.json").read_text()) == timeless(whole.history)


def test_a_local_checkpoint_killed_while_it_is_written_leaves_the_last_whole_one(fork, tmp_path):
    def half_written():
        sizes = []
        for path in tmp_path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return len(sizes) > 1 and min(sizes) < LARGE

    [number], said = fork([{}], "save", str(tmp_path))
    while not half_written():
        psutil.Process(number)  # it is there
    os.kill(number, signal.SIGKILL)
    assert codes(said) == [-signal.SIGKILL] and half_written()
    names = sorted(path.name for path in tmp_path.glob("step_*.safetensors"))
    assert all(state_from_safetensors((tmp_path / name).read_bytes())["parts"] for name in names)
    last = int(names[-1].split("_")[1])
    large().fit(num_steps=last + 1, callbacks=[Checkpoint(str(tmp_path)), (steps := Steps())])
    assert steps.seen == [last + 1]


def test_an_error_within_a_step_leaves_nothing_that_changes_the_training_when_it_is_taken_up(tmp_path):
    whole = trainee()
    whole.fit(2)
    broken = trainee()
    with pytest.raises(ZeroDivisionError):
        broken.fit(2, [Checkpoint(str(tmp_path), every=1), Call(after_backward=at(5, fail))])
    broken.history, broken.steps, broken.batch = [], 0, 0
    broken.fit(2, [Checkpoint(str(tmp_path), every=1)])
    assert same(broken.model, whole.model)


def test_a_damaged_checkpoint_is_passed_over_and_those_that_a_kill_left_behind_go(tmp_path):
    trainee().fit(2, [Checkpoint(str(tmp_path), every=3, keep=3)])
    *names, newest = sorted(tmp_path.iterdir())
    assert len(names) == 2 and newest.name == "step_000000022_000000000.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    loop = trainee()
    assert len(loop.fit(2, [Checkpoint(str(tmp_path), keep=3)])) == 2 and loop.steps == 22  # from the one before
    for epochs in 2, 3:  # with no step left, and with some
        trainee().fit(epochs, [Checkpoint(str(tmp_path), keep=1)])
        assert [path.name for path in tmp_path.iterdir()] == [f"step_{11 * epochs:09d}_000000000.safetensors"]


def test_any_state_is_packed_without_a_pickle():
    plain = {"a": [1, 2.5, None, "text", True, (1, (2, 3))], 4: {"inf": float("inf")}, "d": {}, "l": [], "u": ()}
    tensors = {"t": torch.arange(6).view(2, 3).T, "half": noise(3).bfloat16(), "empty": torch.zeros(0)}
    tensors["scalar"] = torch.tensor(0.1)
    data = state_to_safetensors(plain | tensors)
    assert len(safetensors.torch.load(data)) == 5, "a plain safetensors file, which cannot hold code"
    with pytest.raises(TypeError, match="not JSON serializable"):
        state_to_safetensors({"object": torch.nn.ReLU()})
    again = state_from_safetensors(data)
    assert all(torch.equal(tensor, again.pop(name)) for name, tensor in tensors.items()) and again == plain


def two_processes():
    """What torchrun sets for each of two processes."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


@pytest.fixture(scope="module")
def both(tmp_path_factory, fork):
    """What `train_and_measure` left behind, weights and values: in one process, and in two with half the batch."""
    folder = tmp_path_factory.mktemp("both")
    for count, environments in (1, [{}]), (2, two_processes()):
        codes(fork(environments, "both", 2 // count, str(folder / f"{count}"))[1])
    return [
        (load_file(folder / count / "weights.safetensors"), json.loads((folder / count / "done.json").read_text()))
        for count in "12"
    ]


def test_two_processes_train_and_measure_as_one_with_twice_the_batch(both):
    (weights, one), (others, two) = both
    for name in weights:  # those of adversaries with two optimizers, too
        torch.testing.assert_close(weights[name], others[name])
    assert one["row"] == pytest.approx(two["row"], rel=1e-5)
    assert one["moves"] == two["moves"] == 3 * 4  # of a scheduler given to TrainLoop; 8 batches, accumulated by two
    assert one["predicted"] == two["predicted"] == list(range(41))  # in the order of the loader
    assert one["drawn"] == two["drawn"] == list(range(44))  # each process its part


def test_training_on_two_processes_goes_on_exactly_where_each_of_them_was(both):
    for _, values in both:  # within an epoch, after one, at the next one's start
        assert values["again"] == {"3": True, "6": True, "7": True}


def test_of_two_processes_the_first_changes_the_store_and_the_other_one_waits_for_it(fork, tmp_path):
    environment = storage.serve(tmp_path / "s3")
    (tmp_path / "s3/old").mkdir()
    with fault_proxy(environment["AWS_ENDPOINT_URL"], delay=0.01) as proxy:
        environment["AWS_ENDPOINT_URL"] = proxy.url
        assert codes(fork([two | environment for two in two_processes()], "store", str(tmp_path))[1]) == [0, 0]
    for rank in "01":
        assert (tmp_path / f"seen-{rank}").read_text() == "{'train': 7, 'val': 2, 'test': 1} True"
    assert [path.name for path in (tmp_path / "s3").iterdir()] == ["new"]


def test_training_goes_on_with_as_many_processes_only(tmp_path):
    trainee().fit(1, [Checkpoint(str(tmp_path))])
    [path] = tmp_path.iterdir()
    state = state_from_safetensors(path.read_bytes())
    path.write_bytes(state_to_safetensors(state | {"processes": state["processes"] * 2}))
    with pytest.raises(ValueError, match="begun with 2 processes and cannot go on with 1"):
        trainee().fit(1, [Checkpoint(str(tmp_path))])


def train(url, folder):
    storage.connect()
    loop = trainee()
    loop.fit(3, [Checkpoint(url, every=1), Steps()])
    save_file(loop.model.state_dict(), Path(folder) / "weights.safetensors")
    (Path(folder) / "history.json").write_text(json.dumps(timeless(loop.history)))


LARGE = 12 * 2**20  # bytes of a state whose writing takes long enough to be killed within


def large():
    return plain_loop(nn.Linear(2**20, 3), TensorDataset(torch.zeros(8, 2**20), labels(8)))


def save(folder):
    large().fit(num_steps=1000, callbacks=[Checkpoint(folder, every=1)])


def change_store(folder):
    storage.connect()
    storage.create_bucket("new")
    storage.delete_bucket("old")
    storage.write("s3://new/pets/raw/cats/0", b"x" * 9)
    (Path(folder) / "cats").mkdir(exist_ok=True)
    for i in range(1, 10):
        (Path(folder) / f"cats/{i}").write_bytes(b"x" * i)
    zips.upload(f"{folder}/cats", "s3://new/pets/raw/cats")
    counts = zips.split_classes("s3://new/pets")
    Path(f"{folder}/seen-{os.environ['RANK']}").write_text(f"{counts} {storage.buckets() == ['new']}")


def train_and_measure(factor, folder):
    def loader(*tensors, size=8, **options):
        return DataLoader(TensorDataset(*tensors), size * factor, **options)

    torch.manual_seed(0)
    net, gan, layer = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), Adversaries(), nn.Linear(5, 3)
    train, val = loader(noise(64, 5), labels(64)), loader(noise(41, 5, seed=3), labels(41))
    metrics, optimizer = {"accuracy": MulticlassAccuracy(3)}, torch.optim.SGD(net.parameters(), lr=0.1)
    loop = TrainLoop(net, train, val, optimizer=optimizer, criterion=CRITERION, metrics=metrics)
    row = timeless(loop.fit(3))[-1]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (gan.discriminator, gan.generator)]
    pairs, criterion = loader(noise(16, 4), noise(16, 2, seed=1), size=4), nn.BCEWithLogitsLoss()
    TrainLoop(gan, pairs, optimizer=optimizers, criterion=criterion, accumulate=2).fit(3)

    def one_of_two():
        loop = trainee(own_generator=False)  # 11 batches, 6 of them here when there are two processes
        torch.manual_seed(100 + loop.accelerator.process_index)  # dropout and augmentation of its own
        return loop

    whole, again = one_of_two(), {}
    whole.fit(3)
    for stop in 3, 6, 7:
        url = f"{folder}/checkpoints_{stop}"
        one_of_two().fit(3, [Checkpoint(url, every=1), Call(LAST, after_step=at(stop, cancel))])
        resumed = one_of_two()
        resumed.fit(3, [Checkpoint(url, every=1)])
        equal = same(resumed.model, whole.model) and timeless(resumed.history) == timeless(whole.history)
        again[stop] = all(gather_object([equal]))

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    options = dict(optimizer=optimizer, criterion=CRITERION, scheduler=scheduler, accumulate=2)
    TrainLoop(layer, loader(noise(64, 5), labels(64), size=4), **options).fit(3)
    predicted = TrainLoop(layer).predict(loader(noise(41, 5), torch.arange(41), size=4))[1].tolist()
    torch.manual_seed(loop.accelerator.process_index)
    shuffled = TrainLoop(nn.Linear(1, 1), loader(torch.arange(44.0), size=2, shuffle=True)).train_loader
    drawn = sorted(gather_object([index for (batch,) in shuffled for index in batch.tolist()]))
    if loop.accelerator.is_main_process:
        Path(folder).mkdir(exist_ok=True)
        save_file({**net.state_dict(), **gan.state_dict()}, f"{folder}/weights.safetensors")
        found = dict(row=row, again=again, drawn=drawn, moves=scheduler.last_epoch, predicted=predicted)
        Path(f"{folder}/done.json").write_text(json.dumps(found))
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsspec.get_filesystem_class("s3")  # imports s3fs
    for line in sys.stdin:
        environments, mode, *arguments = json.loads(line)
        numbers = []
        for environment in environments:
            numbers.append(os.fork())
            if not numbers[-1]:
                os.environ |= environment
                sys.stdout = sys.stderr  # for the progress bar
                {"train": train, "save": save, "both": train_and_measure, "store": change_store}[mode](*arguments)
                os._exit(0)
        print(json.dumps(numbers), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]), flush=True)

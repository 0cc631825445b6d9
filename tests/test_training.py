"""The training loop against plain PyTorch written out by hand, and its callbacks. All on the CPU."""

import multiprocessing
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from helpers import images
from helpers.chapters.evaluation import question_answering
from helpers.training import Callback, CancelFit, TrainLoop

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def data(count=22, seed=0):
    """Noise with a trace of the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    inputs = torch.randn(count, 3, 8, 8, generator=generator) + targets[:, None, None, None]
    return TensorDataset(inputs, targets)


def network():
    """A small CNN with a batch norm and a dropout, always with the same weights."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(4, CLASSES))


def loader(dataset, shuffle=False, **options):
    return images.loader(dataset, 8, shuffle, **options)  # 8, 8 and 6 of 22


def make_loop(train="shuffled", val=None, test=None, model=None, **options):
    """A loop with all that belongs to it; by default over shuffled data and without validation."""
    model = model or network()
    train = loader(data(), shuffle=True) if train == "shuffled" else train
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return TrainLoop(model, train, val, test, **{"optimizer": optimizer, "criterion": nn.CrossEntropyLoss(), **options})


def validation(**options):
    return loader(data(seed=1), **options)


def accuracy(**options):
    return {"accuracy": MulticlassAccuracy(CLASSES, **options)}


def fit(loop, *given, **options):
    torch.manual_seed(1)
    return loop.fit(*given, **options)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_and_losses_are_those_of_a_plain_pytorch_loop_bit_for_bit():
    model, batches = network(), loader(data(), shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=9)
    criterion, losses, rates, seen = nn.CrossEntropyLoss(), [], [], []
    torch.manual_seed(1)
    for _ in range(3):
        model.train()
        total = torch.zeros(())
        for inputs, targets in batches:
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.detach() * len(targets)
            rates.append(scheduler.get_last_lr())
        losses.append(total.item() / 22)

    class Rates(Callback):
        def after_step(self, loop):
            seen.append(loop.scheduler.get_last_lr())

    loop = make_loop(val=validation(), metrics=accuracy())  # validation does not change the training
    loop.scheduler = torch.optim.lr_scheduler.OneCycleLR(*loop.optimizers, 0.01, total_steps=9)
    history = fit(loop, 3, [Rates()])
    assert same_weights(loop.model, model) and not same_weights(loop.model, network())
    assert [row["train_loss"] for row in history] == losses and seen == rates
    assert losses[-1] < losses[0]


def test_history_has_a_row_per_epoch_and_two_fits_train_as_one_longer_fit():
    whole, loop = (make_loop(val=validation(), metrics=accuracy(average="micro")) for _ in range(2))
    fit(whole, 3)
    assert [row["epoch"] for row in fit(loop, 2)] == [1, 2]
    assert loop.fit(1) is loop.history and [row["epoch"] for row in loop.history] == [1, 2, 3]
    for row in loop.history:
        assert list(row) == ["epoch", "train_loss", "train_samples_per_second", "val_loss", "val_accuracy"]
        assert all(type(value) is (int if name == "epoch" else float) for name, value in row.items())
        assert row["train_samples_per_second"] > 0
    drop = {"train_samples_per_second": None}
    assert [row | drop for row in whole.history] == [row | drop for row in loop.history]
    assert same_weights(whole.model, loop.model)
    last = loop.evaluate(validation())
    assert last == {name: loop.history[-1][f"val_{name}"] for name in ("loss", "accuracy")}


def test_steps_by_hand_in_ones_own_loop_do_what_fit_does():
    fitted, by_hand = make_loop(val=validation()), make_loop(val=validation())
    fit(fitted, 2)
    torch.manual_seed(1)
    for _ in range(2):
        losses = [by_hand.step(batch) for batch in by_hand.train_loader]
        by_hand.evaluate(by_hand.val_loader)  # leaves the model in its other mode
    assert same_weights(fitted.model, by_hand.model)
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in losses)
    by_hand.fit(1)
    assert [row["epoch"] for row in by_hand.history] == [1]


def test_loaders_with_workers_train_alike_and_leave_no_processes():
    here, loop = make_loop(), make_loop(loader(data(), shuffle=True, num_workers=2))
    fit(here, 2), fit(loop, 2)
    assert same_weights(here.model, loop.model)
    val, before = validation(num_workers=1), set(multiprocessing.active_children())
    first, again = loop.predict(val), loop.predict(val)
    assert torch.equal(first[0], again[0])
    assert len(set(multiprocessing.active_children()) - before) == 1


def test_the_device_is_waited_for_now_and_then_only(monkeypatch):
    waits, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(1) or item(tensor))
    rows = TensorDataset(torch.randn(8 * 500, 4), torch.zeros(8 * 500, dtype=int))
    model = nn.Linear(4, 3)
    make_loop(loader(rows), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01)).fit(1)
    assert len(waits) < 100  # of 500 steps; the loader's seed, the epoch's row, and the bar now and then


def test_what_is_missing_for_training_is_named():
    for loop, epochs in ((TrainLoop(network()), 1), (TrainLoop(network(), loader(data())), 1), (make_loop(), None)):
        with pytest.raises(ValueError, match="a train_loader and an optimizer, and fit a num_epochs or num_steps"):
            loop.fit(epochs)


def test_evaluate_counts_every_sample_once_though_the_last_batch_is_smaller():
    inputs, targets = data(seed=1).tensors
    loop = make_loop(None, metrics=accuracy(average="micro") | {"f1": MulticlassF1Score(CLASSES)})
    with torch.no_grad():
        outputs = loop.model.eval()(inputs)
    found = loop.evaluate(validation())
    assert list(found) == ["loss", "accuracy", "f1"]
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
    assert found["f1"] == pytest.approx(MulticlassF1Score(CLASSES)(outputs, targets).item())
    assert loop.evaluate(validation()) == found
    without_criterion = TrainLoop(loop.model, metrics=accuracy())
    assert list(without_criterion.evaluate(validation())) == ["accuracy"]


def test_predict_gives_outputs_and_targets_in_the_order_of_the_loader():
    dataset = data()
    loop = TrainLoop(network())
    outputs, targets = loop.predict(loader(dataset))
    with torch.no_grad():
        assert torch.allclose(outputs, loop.model.eval()(dataset.tensors[0]), atol=1e-6)
    assert torch.equal(targets, dataset.tensors[1]) and outputs.device.type == "cpu"
    shuffled, shuffled_targets = loop.predict(loader(dataset, shuffle=True))
    order = torch.cat([batch for (batch,) in loader(TensorDataset(torch.arange(22)), shuffle=True)])
    assert torch.equal(shuffled_targets, targets[order]) and torch.allclose(shuffled, outputs[order], atol=1e-6)


class Texts(nn.Module):
    """Says its texts in capitals, with their lengths as logits; trains on nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def get_loss(self, batch, criterion):
        return self.weight + len(batch["text"])

    def get_predictions(self, batch):
        outputs = [text.upper() for text in batch["text"]]
        return outputs, batch["target"], [{"length": len(text)} for text in batch["text"]]


TEXTS = [{"text": "word " * n, "target": "WORD " * n} for n in range(1, 6)]


def test_texts_are_trained_on_evaluated_and_predicted():
    texts = DataLoader(TEXTS, 2)
    loop = make_loop(texts, texts, model=Texts(), metrics=question_answering())
    loop.optimizers[0].param_groups[0]["lr"] = 0.0
    [row] = loop.fit(1)
    assert row["train_loss"] == row["val_loss"] == pytest.approx((2 + 2 + 2 + 2 + 1) / 5)
    assert row["val_exact_match"] == 1
    outputs, targets, extra = loop.predict(texts)
    assert outputs == targets == [row["target"] for row in TEXTS]
    assert extra == [{"length": 5 * n} for n in range(1, 6)]


def test_predictions_of_different_lengths_are_a_list():
    class Lengths(nn.Module):
        def get_loss(self, batch, criterion):
            return torch.tensor(0.0)

        def get_predictions(self, batch):
            return torch.zeros(len(batch), int(batch.max()), 2), batch

    outputs, targets = TrainLoop(Lengths()).predict(DataLoader([1, 2, 5, 4], 2))
    assert [tuple(output.shape) for output in outputs] == [(2, 2)] * 2 + [(5, 2)] * 2
    assert targets.tolist() == [1, 2, 5, 4]


def test_a_loader_without_batches_is_said_and_nothing_is_measured():
    loop = make_loop(val=loader(data(0)), metrics=accuracy())
    with pytest.warns(UserWarning, match="nothing to evaluate"):
        assert "val_loss" not in loop.fit(1)[-1]
    assert loop.predict(loader(data(0))) == ([], [])


class Stream(IterableDataset):
    """As many samples as there are, which nobody knows beforehand."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def test_a_stream_without_a_length_trains_as_a_loader_with_one():
    for length in {"num_epochs": 2}, {"num_steps": 4}:
        stream, plain = (make_loop(DataLoader(rows, 8)) for rows in (Stream(data()), data()))
        fit(stream, **length), fit(plain, **length)
        assert same_weights(stream.model, plain.model) and not same_weights(plain.model, network())


def test_an_incomplete_group_at_the_end_of_a_stream_makes_no_step_and_leaves_nothing():
    seen = []

    class Steps(Callback):
        def after_step(self, loop):
            seen.append(loop.stepped)

        def after_epoch(self, loop):
            assert all(weight.grad is None for weight in loop.model.parameters())

    make_loop(DataLoader(Stream(data()), 8), accumulate=2).fit(2, [Steps()])
    assert seen == [False, True, False] * 2


def test_a_frozen_batch_norm_stays_frozen_after_validation():
    loop = make_loop(val=validation())
    loop.model.train()
    norm = loop.model[1].eval()
    before = norm.running_mean.clone()
    loop.fit(2)
    loop.predict(loop.val_loader)
    loop.fit(1)
    assert torch.equal(norm.running_mean, before) and not norm.training
    loop.step(next(iter(loop.train_loader)))
    assert not norm.training and loop.model[5].training


def test_a_test_loader_is_evaluated_when_training_has_ended():
    test = loader(data(seed=2))
    loop = make_loop(val=validation(), test=test, metrics=accuracy())
    first, last = loop.fit(2)
    assert {name: last[f"test_{name}"] for name in ("loss", "accuracy")} == loop.evaluate(test)
    assert "test_loss" not in first


class Diary(Callback):
    """Notes its name and the moment, with the epoch."""

    def __init__(self, pages, name="", order=0, cancel=None):
        self.pages, self.name, self.order, self.cancel = pages, name, order, cancel

    def __getattr__(self, moment):
        if not moment.startswith(("before_", "after_")):
            raise AttributeError(moment)

        def note(loop):
            self.pages.append(f"{self.name}{moment} {getattr(loop, 'epoch', 0)}")
            if self.pages[-1] == self.cancel:
                raise CancelFit

        return note


def epoch(number, steps=3):
    step = [f"after_backward {number}", f"after_step {number}"]
    return [f"before_epoch {number}", *step * steps, f"after_epoch {number}"]


def test_callbacks_are_called_at_every_moment_by_their_order_and_then_as_given():
    pages, loop = [], make_loop()
    loop.fit(2, [Diary(pages)])
    assert pages == ["before_fit 0", *epoch(1), *epoch(2), "after_fit 2"]
    loop.fit(1, [Diary(pages := [], "c ", 2), Diary(pages, "a ", -1), Diary(pages, "b ", 2), Callback()])
    assert pages[:3] == ["a before_fit 2", "c before_fit 2", "b before_fit 2"]


@pytest.mark.parametrize(
    "cancel, rows", [("before_fit 0", 0), ("before_epoch 2", 1), ("after_step 2", 1), ("after_epoch 2", 2)]
)
def test_a_callback_that_cancels_ends_the_fit_in_good_order_and_it_can_go_on(cancel, rows):
    pages, loop = [], make_loop()
    history = loop.fit(5, [Diary(pages, cancel=cancel)])
    assert pages[-2] == cancel and pages[-1].startswith("after_fit") and len(history) == rows
    loop.fit(1)
    assert [row["epoch"] for row in loop.history] == list(range(1, rows + 2))


def test_another_error_of_a_callback_is_told_to_all_and_not_swallowed():
    class Broken(Callback):
        def after_step(self, loop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_loop().fit(1, [Broken(), Diary(pages := [])])
    assert pages[-1] == "after_error 1"


def test_the_progress_bar_shows_epoch_loss_and_samples_per_second(capsys):
    make_loop().fit(2)
    bars = re.split("[\r\n]", capsys.readouterr().out)
    last = [bar for bar in bars if bar.strip()][-1]
    assert re.search(r"epoch 2/2: 100%.*6/6 .*loss \d\.\d{3}, [\d,]+ samples/s", last)

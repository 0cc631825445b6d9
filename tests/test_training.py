"""The training loop against plain PyTorch written out by hand, and its callbacks. All on the CPU."""

import multiprocessing
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import images
from helpers.chapters.evaluation import question_answering
from helpers.training import MOMENTS, Callback, CancelFit, TrainLoop
from loops import Call, same, timeless

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


def validation():
    return loader(data(seed=1))


def make_loop(train="shuffled", val=None, test=None, model=None, **options):
    """A loop with all that belongs to it; by default over shuffled data and without validation."""
    model = model or network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"optimizer": optimizer, "criterion": nn.CrossEntropyLoss(), **options}
    train = loader(data(), shuffle=True) if train == "shuffled" else train
    return TrainLoop(model, train, val, test, **options)


def accuracy():
    return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def fit(loop, *given, **options):
    torch.manual_seed(1)
    return loop.fit(*given, **options)


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

    loop = make_loop(val=validation(), metrics=accuracy())  # validation does not change the training
    loop.scheduler = torch.optim.lr_scheduler.OneCycleLR(*loop.optimizers, 0.01, total_steps=9)
    history = fit(loop, 3, [Call(after_step=lambda loop: seen.append(loop.scheduler.get_last_lr()))])
    assert same(loop.model, model) and not same(loop.model, network())
    assert [row["train_loss"] for row in history] == losses and losses[-1] < losses[0] and seen == rates


def test_history_has_a_row_per_epoch_and_two_fits_train_as_one_longer_fit():
    whole, loop = (make_loop(val=validation(), metrics=accuracy()) for _ in range(2))
    fit(whole, 3)
    fit(loop, 2)
    assert loop.fit(1) is loop.history and [row["epoch"] for row in loop.history] == [1, 2, 3]
    for row in loop.history:
        assert list(row) == ["epoch", "train_loss", "train_samples_per_second", "val_loss", "val_accuracy"]
        assert all(type(value) is (int if name == "epoch" else float) for name, value in row.items())
    assert timeless(whole.history) == timeless(loop.history) and same(whole.model, loop.model)


def test_steps_by_hand_in_ones_own_loop_do_what_fit_does():
    fitted, by_hand = make_loop(val=validation()), make_loop(val=validation())
    fit(fitted, 2)
    torch.manual_seed(1)
    for _ in range(2):
        losses = [by_hand.step(batch) for batch in by_hand.train_loader]
        by_hand.evaluate(by_hand.val_loader)  # leaves the model in its other mode
    assert same(fitted.model, by_hand.model)
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in losses)


def test_loaders_with_workers_train_alike_and_leave_no_processes():
    here, loop = make_loop(), make_loop(loader(data(), shuffle=True, num_workers=2))
    fit(here, 1), fit(loop, 1)
    assert same(here.model, loop.model)
    before = set(multiprocessing.active_children())
    first, again = loop.predict(loop.train_loader), loop.predict(loop.train_loader)
    assert first[0].shape == again[0].shape and set(multiprocessing.active_children()) == before


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
    loop = make_loop(metrics=accuracy())
    outputs = loop.model.eval()(inputs)
    found = loop.evaluate(validation())
    assert list(found) == ["loss", "accuracy"]
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
    assert loop.evaluate(validation()) == found
    without_criterion = TrainLoop(loop.model, metrics=accuracy())
    assert list(without_criterion.evaluate(validation())) == ["accuracy"]


def test_predict_gives_outputs_and_targets_in_the_order_of_the_loader():
    dataset = data()
    loop = TrainLoop(network())
    shuffled = loader(dataset, shuffle=True)
    order = torch.cat([batch for (batch,) in loader(TensorDataset(torch.arange(22)), shuffle=True)])
    expected = loop.model.eval()(dataset.tensors[0])
    for each, rows in (loader(dataset), torch.arange(22)), (shuffled, order):
        outputs, targets = loop.predict(each)
        assert torch.equal(targets, dataset.tensors[1][rows]) and torch.allclose(outputs, expected[rows], atol=1e-6)


class Texts(nn.Module):
    """Says its texts in capitals; trains on nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def get_loss(self, batch, criterion):
        return 0 * self.weight + len(batch["text"])

    def get_predictions(self, batch):
        outputs = [text.upper() for text in batch["text"]]
        return outputs, batch["target"], torch.zeros(len(outputs), max(map(len, outputs)))


def test_texts_are_trained_on_evaluated_and_predicted_and_outputs_of_different_lengths_are_a_list():
    rows = [{"text": "word " * n, "target": "WORD " * n} for n in range(1, 6)]
    texts = DataLoader(rows, 2)
    loop = make_loop(texts, texts, model=Texts(), metrics=question_answering())
    [row] = loop.fit(1)
    assert (
        row["train_loss"] == row["val_loss"] == pytest.approx((2 + 2 + 2 + 2 + 1) / 5) and row["val_exact_match"] == 1
    )
    outputs, targets, extra = loop.predict(texts)
    assert outputs == targets == [row["target"] for row in rows]
    assert [len(each) for each in extra] == [10, 10, 20, 20, 25]  # padded batch by batch


def test_a_test_loader_is_evaluated_when_training_has_ended_and_a_loader_without_batches_is_said():
    test, nothing = loader(data(seed=2)), loader(data(0))
    loop = make_loop(val=nothing, test=test, metrics=accuracy())
    with pytest.warns(UserWarning, match="nothing to evaluate"):
        first, last = loop.fit(2)
    assert {name: last[f"test_{name}"] for name in ("loss", "accuracy")} == loop.evaluate(test)
    assert "test_loss" not in first and "val_loss" not in first
    assert loop.predict(nothing) == ([], [])


class Stream(IterableDataset):
    """As many samples as there are, which nobody knows beforehand."""

    def __iter__(self):
        return iter(data())


def test_a_stream_without_a_length_trains_as_a_loader_with_one():
    for length in {"num_epochs": 2}, {"num_steps": 4}:
        stream, plain = (make_loop(DataLoader(rows, 8)) for rows in (Stream(), data()))
        fit(stream, **length), fit(plain, **length)
        assert same(stream.model, plain.model) and not same(plain.model, network())
    seen, left = [], []  # an incomplete group of batches at the end makes no step and leaves nothing
    note_step = Call(after_step=lambda loop: seen.append(loop.stepped))
    note_rest = Call(after_epoch=lambda loop: left.extend(weight.grad for weight in loop.model.parameters()))
    make_loop(DataLoader(Stream(), 8), accumulate=2).fit(2, [note_step, note_rest])
    assert seen == [False, True, False] * 2 and set(left) == {None}


def test_a_frozen_batch_norm_stays_frozen_after_validation():
    loop = make_loop(val=validation())
    loop.model.train()
    norm = loop.model[1].eval()
    before = norm.running_mean.clone()
    loop.fit(2)
    loop.predict(loop.val_loader)
    loop.step(next(iter(loop.train_loader)))
    assert torch.equal(norm.running_mean, before) and not norm.training and loop.model[5].training


def diary(pages, name="", order=0, end=None, error=CancelFit):
    """A callback that notes its name and each moment, with the epoch, and raises an error when it has noted `end`."""

    def note(moment, loop):
        pages.append(f"{name}{moment} {getattr(loop, 'epoch', 0)}")
        if pages[-1] == end:
            raise error

    return Call(order, **{moment: partial(note, moment) for moment in MOMENTS})


def test_callbacks_are_called_at_every_moment_by_their_order_and_then_as_given():
    pages, loop = [], make_loop()
    loop.fit(2, [diary(pages)])
    steps = ["after_backward {0}", "after_step {0}"] * 3
    epochs = [page.format(n) for n in (1, 2) for page in ("before_epoch {0}", *steps, "after_epoch {0}")]
    assert pages == ["before_fit 0", *epochs, "after_fit 2"]
    loop.fit(1, [diary(pages := [], "c ", 2), diary(pages, "a ", -1), diary(pages, "b ", 2), Callback()])
    assert pages[:3] == ["a before_fit 2", "c before_fit 2", "b before_fit 2"]
    with pytest.raises(KeyboardInterrupt):  # an error is told to all and not swallowed
        loop.fit(1, [diary(pages, end="after_step 4", error=KeyboardInterrupt)])
    assert pages[-1] == "after_error 4"


def test_a_callback_that_cancels_ends_the_fit_in_good_order_and_it_can_go_on():
    for end, rows in ("before_fit 0", 0), ("before_epoch 2", 1), ("after_step 2", 1), ("after_epoch 2", 2):
        pages, loop = [], make_loop()
        assert len(loop.fit(5, [diary(pages, end=end)])) == rows
        assert pages[-2] == end and pages[-1].startswith("after_fit")
        loop.fit(1)
        assert [row["epoch"] for row in loop.history] == list(range(1, rows + 2))


def test_the_progress_bar_shows_epoch_loss_and_samples_per_second(capsys):
    make_loop().fit(2)
    bars = re.split("[\r\n]", capsys.readouterr().out)
    last = [bar for bar in bars if bar.strip()][-1]
    assert re.search(r"epoch 2/2: 100%.*6/6 .*loss \d\.\d{3}, [\d,]+ samples/s", last)

"""The training loop against plain PyTorch written out by hand, and the moments of its callbacks. All on the CPU."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics.classification import MulticlassAccuracy

from helpers.chapters.evaluation import question_answering
from helpers.training import MOMENTS, Callback, CancelFit, TrainLoop
from loops import Call, Net, Rows, Stream, batches, make_loop, same


def accuracy():
    return {"accuracy": MulticlassAccuracy(3, average="micro")}


def fit(loop, *given, **options):
    torch.manual_seed(1)
    return loop.fit(*given, **options)


def test_weights_losses_and_rates_are_those_of_a_plain_pytorch_loop_bit_for_bit():
    plain, fitted, by_hand = loops = [make_loop(kind=torch.optim.AdamW, metrics=accuracy()) for _ in range(3)]
    for loop in loops:
        loop.scheduler = torch.optim.lr_scheduler.OneCycleLR(*loop.optimizers, 0.01, total_steps=15)
        loop.model.norm.eval()  # stays frozen, though the model is in its other mode when it is validated
    model, [optimizer], losses, rates, seen = plain.model, plain.optimizers, [], [], []
    torch.manual_seed(1)
    for _ in range(3):
        total = torch.zeros(())
        for inputs, targets in plain.train_loader:
            loss = plain.criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            plain.scheduler.step()
            optimizer.zero_grad()
            total += loss.detach() * len(targets)
            rates.append(plain.scheduler.get_last_lr())
        losses.append(total.item() / 18)

    watch = Call(after_step=lambda loop: seen.append(loop.scheduler.get_last_lr()))
    fit(fitted, 2, [watch])
    history = fitted.fit(1, [watch])
    assert [row["train_loss"] for row in history] == losses and losses[-1] < losses[0] and seen == rates
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert list(row) == ["epoch", "train_loss", "train_samples_per_second", "val_loss", "val_accuracy"]
        assert all(type(value) is (int if name == "epoch" else float) for name, value in row.items())
    torch.manual_seed(1)
    for _ in range(3):
        returned = [by_hand.step(batch) for batch in by_hand.train_loader]
        by_hand.evaluate(by_hand.val_loader)
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in returned)
    assert same(fitted.model, model) and same(by_hand.model, model) and not same(model, make_loop().model)


def test_streams_and_batches_that_are_dicts_train_as_pairs_of_a_loader_do():
    by_name = lambda rows: dict(zip(("inputs", "labels"), default_collate(rows)))
    for length in {"num_epochs": 2}, {"num_steps": 7}:
        others = [make_loop(train=loader) for loader in (DataLoader(Stream(), 4), batches(collate_fn=by_name))]
        plain = make_loop(train=batches())
        for loop in plain, *others:
            fit(loop, **length)
        assert all(same(loop.model, plain.model) for loop in others) and not same(plain.model, make_loop().model)
    seen, left = [], []  # an incomplete group of batches at the end makes no step and leaves nothing
    note_step = Call(after_step=lambda loop: seen.append(loop.stepped))
    note_rest = Call(after_epoch=lambda loop: left.extend(weight.grad for weight in loop.model.parameters()))
    make_loop(train=DataLoader(Stream(), 4), accumulate=2).fit(2, [note_step, note_rest])
    assert seen == [False, True, False, True, False] * 2 and set(left) == {None}


def test_the_device_is_waited_for_now_and_then_only(monkeypatch):
    waits, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(1) or item(tensor))
    make_loop(train=DataLoader(Rows(count=2000), 4)).fit(1)
    assert len(waits) < 100  # of 500 steps; the loader's seed, the epoch's row, and the bar now and then


def test_what_is_missing_for_training_is_named():
    for loop, epochs in ((TrainLoop(Net()), 1), (TrainLoop(Net(), batches()), 1), (make_loop(), None)):
        with pytest.raises(ValueError, match="a train_loader and an optimizer, and fit a num_epochs or num_steps"):
            loop.fit(epochs)


def test_every_sample_is_evaluated_and_predicted_once_in_the_order_of_the_loader():
    loop, (inputs, targets) = make_loop(val=DataLoader(Rows(count=0)), metrics=accuracy()), default_collate([*Rows(1)])
    expected = loop.model.eval()(inputs).detach()
    found = loop.evaluate(batches(1))  # its last batch is smaller
    assert found == {
        "loss": pytest.approx(nn.functional.cross_entropy(expected, targets).item(), rel=1e-6),
        "accuracy": pytest.approx((expected.argmax(1) == targets).float().mean().item()),
    }
    assert loop.evaluate(batches(1)) == found
    assert list(TrainLoop(loop.model, metrics=accuracy()).evaluate(batches(1))) == ["accuracy"]
    for shuffle in False, True:
        outputs, order = TrainLoop(loop.model).predict(
            DataLoader(TensorDataset(inputs, torch.arange(18)), 4, shuffle=shuffle)
        )
        assert torch.allclose(outputs, expected[order], atol=1e-6) and sorted(order) == list(range(18))
        assert (order.tolist() != sorted(order)) == shuffle

    loop.test_loader = batches(2)  # evaluated when training has ended; what has no batches is said
    with pytest.warns(UserWarning, match="nothing to evaluate"):
        first, last = loop.fit(2)
    assert {name: last[f"test_{name}"] for name in found} == loop.evaluate(loop.test_loader)
    assert "test_loss" not in first and "val_loss" not in first and loop.predict(loop.val_loader) == ([], [])


def test_texts_are_trained_on_evaluated_and_predicted_and_outputs_of_different_lengths_are_a_list():
    def predict(batch):
        outputs = [text.upper() for text in batch["text"]]
        return outputs, batch["target"], torch.zeros(len(outputs), max(map(len, outputs)))

    rows, model = [{"text": "word " * n, "target": "WORD " * n} for n in range(1, 6)], nn.Linear(1, 1)
    model.get_loss, model.get_predictions = lambda batch, _: 0 * model.weight.sum() + len(batch["text"]), predict
    texts = DataLoader(rows, 2)
    loop = make_loop(train=texts, val=texts, model=model, metrics=question_answering())
    [row] = loop.fit(1)
    assert row["train_loss"] == row["val_loss"] == pytest.approx((2 + 2 + 2 + 2 + 1) / 5)
    assert row["val_exact_match"] == 1
    outputs, targets, extra = loop.predict(texts)
    assert outputs == targets == [row["target"] for row in rows]
    assert [len(each) for each in extra] == [10, 10, 20, 20, 25]  # padded batch by batch


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
    steps = ["after_backward {0}", "after_step {0}"] * 5
    epochs = [page.format(n) for n in (1, 2) for page in ("before_epoch {0}", *steps, "after_epoch {0}")]
    assert pages == ["before_fit 0", *epochs, "after_fit 2"]
    loop.fit(1, [diary(pages := [], "c ", 2), diary(pages, "a ", -1), diary(pages, "b ", 2), Callback()])
    assert pages[:3] == ["a before_fit 2", "c before_fit 2", "b before_fit 2"]
    with pytest.raises(KeyboardInterrupt):  # an error is told to all and not swallowed
        loop.fit(1, [diary(pages, end="after_step 4", error=KeyboardInterrupt)])
    assert pages[-1] == "after_error 4"
    for end, rows in ("before_fit 0", 0), ("before_epoch 2", 1), ("after_step 2", 1), ("after_epoch 2", 2):
        pages, loop = [], make_loop()
        assert len(loop.fit(5, [diary(pages, end=end)])) == rows  # cancelled in good order, and it can go on
        assert pages[-2] == end and pages[-1].startswith("after_fit")
        assert [row["epoch"] for row in loop.fit(1)] == list(range(1, rows + 2))


def test_the_progress_bar_shows_epoch_loss_and_samples_per_second(capsys):
    make_loop().fit(2)
    bars = re.split("[\r\n]", capsys.readouterr().out)
    last = [bar for bar in bars if bar.strip()][-1]
    assert re.search(r"epoch 2/2: 100%.*10/10 .*loss \d\.\d{3}, [\d,]+ samples/s", last)

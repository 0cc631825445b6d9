"""What every callback does, as its user sees it: rates, weights, files, mails. All on the CPU."""

import csv
import io
import json
import math
import ssl
import sys
import threading
import urllib.request
import warnings
from contextlib import contextmanager, nullcontext
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import boto3
import numpy as np
import pytest
import torch
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset, default_collate

from helpers import callbacks, experiment, storage, training
from helpers.callbacks import Checkpoint, ClipGradients, EarlyStopping, LearningRate, SaveHistory
from helpers.chapters.recipes import (ConstantPrediction, DryRun, GradientStatistics, Notify, TensorBoard,
                                      TerminateOnNaN)
from helpers.training import Callback, CancelFit, TrainLoop
from servers import free_port
from servers.embedded import connected

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Requiring AUTH")]  # of aiosmtpd

LAST = 1000  # an order after all others


class Call(Callback):
    """Functions of the loop, by the moment at which they are called."""

    def __init__(self, order=0, **functions):
        self.order = order
        vars(self).update(functions)


class Net(nn.Module):
    """Two layers; with `get_loss` of two optimizers, a loss for each."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head, self.spare = nn.Linear(5, 4), nn.Dropout(0.2), nn.Linear(4, 3), nn.Linear(1, 1)

    def forward(self, inputs):
        return self.head(self.drop(torch.tanh(self.body(inputs))))


class Pair(Net):
    def get_loss(self, batch, criterion):
        for _ in range(2):
            yield criterion(self(batch[0]), batch[1])

    def get_predictions(self, batch):
        return self(batch[0]), batch[1]


def batches(seed=0, count=20, seen=None, **options):
    """Five batches of 4."""
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator))
    if seen is not None:
        options["collate_fn"] = lambda rows: seen.append(seed) or default_collate(rows)
    return DataLoader(data, 4, **options)


def make_loop(rates=(0.1,), seen=None, val=True, kind=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = Net() if len(rates) == 1 else Pair()
    parts = [model] if len(rates) == 1 else [model.body, model.head]
    optimizers = [kind(part.parameters(), lr=rate) for part, rate in zip(parts, rates)]
    train = batches(seen=seen, shuffle=True, generator=torch.Generator().manual_seed(3))
    return TrainLoop(model, train, batches(1, seen=seen) if val else None, optimizer=optimizers,
                     **{"criterion": nn.CrossEntropyLoss(), **options})


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]


def script(name, values):
    """Puts these values into the history, epoch by epoch."""
    def write(loop):
        loop.history[-1][name] = values[len(loop.history) - 1]
    return Call(after_epoch=write, order=-50)


def fail(loop):
    raise ZeroDivisionError("on purpose")


def at(step, action):
    return lambda loop: action(loop) if loop.steps == step else None


def cancel(loop):
    raise CancelFit


def raises(end):
    return pytest.raises(ZeroDivisionError) if end is fail else nullcontext()


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def rows_of(run, name):
    return list(csv.DictReader(io.StringIO(storage.read(f"{run.url}/{name}.csv").decode())))


def picture(run, name):
    """The shape of a PNG of the run, when it is one with something on it."""
    image = Image.open(io.BytesIO(storage.read(f"{run.url}/plots/{name}.png")))
    assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 10
    return image.size


def checkpoints(url):
    """{steps: state} of all checkpoints at a URL."""
    names = [name for name in storage.list_files(url) if name.startswith("step_")]
    return {int(name[5:14]): callbacks.state_from_safetensors(storage.read(f"{url}/{name}")) for name in names}


@pytest.fixture
def run(tmp_path):
    return experiment.Run(tmp_path / "runs")


# ---------------------------------------------------------------------------------------------------------- DryRun


@pytest.mark.parametrize("end", [None, fail, cancel])
def test_a_dry_run_takes_few_batches_and_leaves_the_loaders_as_they_were(end):
    seen, bars = [], []
    loop = make_loop(seen=seen)
    loaders = loop.train_loader, loop.val_loader
    given = [LearningRate("linear"), Call(after_step=lambda loop: bars.append((loop.bar.total, loop.bar.n))), DryRun(2)]
    with raises(end):
        loop.fit(2, [*given, *[Call(after_epoch=end, order=LAST)] * bool(end)])
    epochs = 1 if end else 2
    assert seen == [0, 0, 1, 1] * epochs and bars == [(4, n + 1) for n in range(2 * epochs)]
    assert (loop.train_loader, loop.val_loader) == loaders
    assert loop.history[-1]["learning_rate"] == pytest.approx(0.05 if end else 0.025)  # a schedule of 4 steps
    loop.fit(1)
    assert len(seen) == 4 * epochs + 10


def test_a_dry_run_of_many_steps_and_without_validation_is_short_too():
    loop = make_loop(val=False)
    loop.fit(num_steps=1000, callbacks=[DryRun(3)])
    assert loop.steps == 3 and len(loop.history) == 1 and len(loop.train_loader) == 5


# --------------------------------------------------------------------------------------------------- learning rates


def watch(rates, which=0):
    """Notes the rate of each step, before it changes."""
    return Call(after_step=lambda loop: rates.append(loop.optimizers[which].param_groups[0]["lr"]), order=-1)


COSINE = [0.1, 0.09755283, 0.09045085, 0.07938926, 0.06545085, 0.05, 0.03454915, 0.02061074, 0.00954915, 0.00244717]
WARM = [0.1 / 3, 0.2 / 3, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]


@pytest.mark.parametrize("schedule, options, expected", [
    ("constant", {}, [0.1] * 10),
    ("constant", {"warmup": 3}, [0.025, 0.05, 0.075] + [0.1] * 7),
    ("linear", {}, [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]),
    ("linear", {"warmup": 2}, WARM),
    ("linear", {"warmup": 0.2}, WARM),
    ("cosine", {}, COSINE),
    ("cosine", {"cycles": 2}, COSINE[::2] * 2),
    ("cosine", {"warmup": 2, "cycles": 2}, WARM[:2] + [0.1, 0.08535534, 0.05, 0.01464466] * 2),
    ("linear", {"every": "epoch"}, [0.1] * 5 + [0.05] * 5),
    (lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.5), {}, [0.1] * 4 + [0.05] * 4 + [0.025] * 2),
    (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.3), {"every": "epoch"}, [0.1] * 5 + [0.03] * 5)])
def test_the_learning_rate_follows_its_schedule(schedule, options, expected):
    rates, loop = [], make_loop()
    history = loop.fit(2, [LearningRate(schedule, **options), watch(rates)])
    assert rates == pytest.approx(expected, rel=1e-5)
    assert history[0]["learning_rate"] == pytest.approx(expected[4 if "every" in options else 5], rel=1e-5)


def test_the_schedule_counts_steps_of_the_optimizer_and_not_batches():
    rates = []
    make_loop(accumulate=2).fit(2, [LearningRate("linear"), watch(rates)])
    assert rates == pytest.approx([x / 60 for x in (6, 6, 5, 5, 4, 3, 3, 2, 2, 1)])
    rates.clear()
    make_loop().fit(num_steps=7, callbacks=[LearningRate("linear"), watch(rates)])
    assert rates == pytest.approx([x / 70 for x in range(7, 0, -1)])


def test_many_warm_restarts_come_at_the_very_step():
    rates = []
    make_loop().fit(18, [LearningRate("cosine", cycles=45), watch(rates)])
    assert rates == pytest.approx([0.1, 0.05] * 45)


def test_every_optimizer_follows_the_schedule_from_its_own_rate():
    first, second = [], []
    loop = make_loop(rates=(0.1, 0.4), val=False)
    loop.fit(2, [LearningRate("linear"), watch(first), watch(second, 1)])
    assert first == pytest.approx([0.01 * x for x in range(10, 0, -1)])
    assert second == pytest.approx([0.04 * x for x in range(10, 0, -1)])


def test_the_schedule_of_a_second_fit_begins_anew():
    rates, loop = [], make_loop()
    for _ in range(2):
        loop.fit(1, [LearningRate("linear"), watch(rates)])
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02] * 2)


def test_a_plateau_of_any_column_lowers_the_rate():
    given = LearningRate(plateau, monitor="distance"), script("distance", [3, 2, 2, 1, 1])
    history = make_loop(val=False).fit(5, given)
    assert [row["learning_rate"] for row in history] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize("make", [
    lambda: LearningRate("cosine", warmup=0.2, cycles=2),
    lambda: LearningRate(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)),
    lambda: LearningRate(lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 9, 12])),
    lambda: LearningRate(plateau, monitor="epoch")])  # which never gets smaller
def test_a_schedule_taken_up_within_an_epoch_goes_on_with_the_same_rates_to_the_same_weights(make, tmp_path):
    expected, rates, url = [], [], str(tmp_path)
    whole, cut_off, again = (make_loop((0.1, 0.2), val=False, kind=torch.optim.Adam) for _ in range(3))
    torch.manual_seed(1)
    whole.fit(3, [make(), watch(expected)])
    torch.manual_seed(1)
    cut_off.fit(3, [make(), watch(rates), Checkpoint(url, every=1), Call(after_step=at(8, cancel), order=LAST)])
    again.fit(3, [make(), watch(rates), Checkpoint(url, every=1)])
    assert rates == expected and len(set(rates)) > 1 and same(again.model, whole.model)
    assert timeless(again.history) == timeless(whole.history)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options, clip", [
    ({"norm": 0.05}, lambda weights: nn.utils.clip_grad_norm_(weights, 0.05)),
    ({"value": 0.01}, lambda weights: nn.utils.clip_grad_value_(weights, 0.01))])
def test_clipped_gradients_train_as_those_clipped_in_a_loop_by_hand(options, clip):
    loop, plain, free = make_loop(), make_loop(), make_loop()
    torch.manual_seed(1)
    [optimizer] = plain.optimizers
    for _ in range(2):
        plain.model.train()
        for inputs, targets in plain.train_loader:
            plain.criterion(plain.model(inputs), targets).backward()
            clip(plain.model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for each, given in (loop, [ClipGradients(**options)]), (free, []):
        torch.manual_seed(1)
        each.val_loader = None
        each.fit(2, given)
    assert same(loop.model, plain.model) and not same(loop.model, free.model)


def test_gradients_of_some_weights_alone_are_clipped():
    loop, free, seen = make_loop(), make_loop(), []
    for each in loop, free:
        given = [ClipGradients(norm=1e-3, weights=list(each.model.body.parameters()))] if each is loop else []
        torch.manual_seed(1)
        keep = Call(after_backward=lambda loop: seen.append([layer.weight.grad.clone()
                                                             for layer in (loop.model.body, loop.model.head)]))
        each.fit(num_steps=1, callbacks=[*given, keep])
    (body, head), (whole_body, whole_head) = seen
    assert body.norm() <= 1.001e-3 < whole_body.norm() and torch.equal(head, whole_head)


def test_statistics_of_gradients_are_those_of_the_gradients_before_they_are_clipped(run):
    kept = []

    def keep(loop):
        kept.extend((loop.epoch, loop.steps, name, weight.grad.numpy().copy())
                    for name, weight in loop.model.named_parameters() if weight.grad is not None)

    given = ClipGradients(value=1e-4), GradientStatistics(run, every=3), Call(after_backward=keep, order=-99)
    make_loop().fit(2, given)
    rows = rows_of(run, "gradients")
    expected = [values for values in kept if values[1] % 3 == 0]
    assert len(rows) == len(expected) == 4 * 4  # steps 0, 3, 6, 9; the two weights of `spare` have no gradient
    for row, (epoch, step, name, grad) in zip(rows, expected):
        assert (row["epoch"], row["step"], row["weight"]) == (str(epoch), str(step), name)
        values = {"norm": np.sqrt((grad ** 2).sum()), "mean": grad.mean(), "std": grad.std(), "max": abs(grad).max(),
                  **{f"quantile_{q}": np.quantile(abs(grad), q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}}
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-4, abs=1e-7)
    width, height = picture(run, "gradients")
    assert width > 500 and height > 100


def test_statistics_of_gradients_come_with_accumulation_too_and_from_a_weight_of_the_criterion(run):
    class Scaled(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return super().forward(self.scale * outputs, targets)

    loop = make_loop(accumulate=2, criterion=Scaled())
    loop.optimizers[0].add_param_group({"params": loop.criterion.parameters()})
    loop.fit(4, [GradientStatistics(run, every=10)])
    rows = rows_of(run, "gradients")
    assert [(row["step"], row["weight"]) for row in rows][::5] == [("1", "body.weight"), ("11", "body.weight")]
    assert [row["weight"] for row in rows][4::5] == ["another"] * 2


@pytest.mark.parametrize("end", [fail, cancel])
def test_statistics_of_gradients_are_there_when_training_ends_within_an_epoch(run, end):
    with raises(end):
        make_loop().fit(1, [GradientStatistics(run, every=1), Call(after_step=at(3, end))])
    assert len(rows_of(run, "gradients")) == 3 * 4 and picture(run, "gradients")


# ---------------------------------------------------------------------------------------------- stop, and be warned


@pytest.mark.parametrize("monitor, values, threshold, epochs", [
    ("val_loss", [1, 0.95, 0.92, 0.8, 0.7, 0.6], 0.1, 3), ("val_loss", [1, 0.95, 0.92, 0.8, 0.7, 0.6], 0, 6),
    ("val_loss", [1, 0.95, 0.85, 0.8, 0.7, 0.6], 0.1, 6),
    ("val_accuracy", [0.1, 0.15, 0.2, 0.5, 0.5, 0.5], 0.2, 3), ("val_loss", [math.nan] * 6, 0, 3),
    ("val_loss", [math.nan, 3, math.nan, 2, math.nan, math.nan], 0, 6)])
def test_early_stopping_wants_more_than_the_threshold_and_is_not_misled_by_nan(monitor, values, threshold, epochs):
    stop = EarlyStopping(monitor, patience=2, threshold=threshold)
    assert len(make_loop(val=False).fit(6, [stop, script(monitor, values)])) == epochs


def test_training_that_was_stopped_early_stays_so_when_started_again(tmp_path):
    loop, again = make_loop(val=False), make_loop(val=False)
    given = [script("val_loss", [2, 1, 3, 3, 0, 0]), EarlyStopping(patience=2), Checkpoint(str(tmp_path))]
    assert len(loop.fit(6, given)) == len(again.fit(6, given)) == 4 and again.steps == 20
    assert len(loop.fit(1, given)) == 5  # but asked to train on, it does


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training_within_the_epoch(monkeypatch, value):
    monkeypatch.setattr(training, "REFRESH", -1)
    factor = {"now": 1.0}
    loop = make_loop(criterion=lambda outputs, targets: factor["now"] * nn.functional.cross_entropy(outputs, targets))
    with pytest.warns(UserWarning, match=f"at step 7 its loss is {value}"):
        loop.fit(3, [TerminateOnNaN(), Call(after_step=at(6, lambda loop: factor.update(now=value)))])
    assert loop.steps == 7 and len(loop.history) == 1


@pytest.mark.parametrize("guard", [[], [TerminateOnNaN()]])
@pytest.mark.parametrize("every", [1, "epoch", "end"])
@pytest.mark.filterwarnings("ignore:Training ended")
def test_no_checkpoint_holds_weights_that_are_no_numbers(monkeypatch, tmp_path, every, guard):
    monkeypatch.setattr(training, "REFRESH", 10)  # looks at the first step of an epoch only
    spoil = Call(after_backward=lambda loop: loop.steps == 6 and loop.model.body.weight.grad.fill_(math.nan))
    loop = make_loop()
    loop.fit(3, [Checkpoint(str(tmp_path), every=every, keep=9), spoil, *guard])
    assert not loop.model.body.weight.isfinite().any() and loop.steps == (10 if guard else 15)
    kept = checkpoints(str(tmp_path))
    assert max(kept, default=0) == {1: 6, "epoch": 5, "end": 0}[every]
    assert all(weight.isfinite().all() for state in kept.values() for weight in state["parts"][0].values())


@pytest.mark.parametrize("outputs, expected", [
    ([[3., 1, 1], [2, 1, 0]], 1), ([[3., 1, 1], [1, 3, 1]], 2), ([[-2.], [-3]], 1), ([[-2.], [3]], 2), ([2., 3], 1)])
def test_a_model_that_predicts_one_class_only_is_warned_of(outputs, expected):
    class Fixed(nn.Linear):
        def get_loss(self, batch, criterion):
            return self(batch[0]).mean()

        def get_predictions(self, batch):
            return torch.tensor(outputs), torch.zeros(len(outputs))

    model = Fixed(5, 1)
    loop = TrainLoop(model, batches(), batches(1), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = loop.fit(1, [ConstantPrediction()])
        assert history[-1]["val_predicted_classes"] == expected
        warning = f"Epoch {loop.epoch}: the model predicts the same class for every validation sample."
        assert [str(each.message) for each in caught] == [warning] * (expected == 1)


# ---------------------------------------------------------------------------------------------------- keep, and tell


@pytest.mark.parametrize("moment, end, epochs", [
    ("after_fit", type, 3), ("after_step", at(12, fail), 2), ("after_epoch", at(15, cancel), 3)])
def test_the_history_and_its_curves_are_saved_however_training_ends(moment, end, epochs, run):
    loop = make_loop()
    with raises(fail if moment == "after_step" else None):
        loop.fit(3, [SaveHistory(run), LearningRate("cosine"), Call(**{moment: end}, order=5)])
    assert len(loop.history) == epochs
    assert rows_of(run, "history") == [{name: str(value) for name, value in row.items()} for row in loop.history]
    width, height = picture(run, "history")
    assert width > 3 * height  # loss, samples per second and learning rate, side by side


def test_curves_show_training_and_validation_of_a_number_in_one_panel():
    history = [{"epoch": 1, "train_loss": 3.0, "val_loss": 4.0, "val_f1": 0.5, "val_classes": [1, 2], "note": "a"},
               {"epoch": 2, "train_loss": 2.0, "val_loss": 3.0, "val_f1": 0.6, "val_classes": [1, 2], "late": 1}]
    panels = {axis.get_title(): axis.lines for axis in callbacks.plot_history(history).axes}
    assert {title: [line.get_label() for line in lines][:2] for title, lines in panels.items()} == {
        "loss": ["train", "val"], "f1": ["val"], "late": ["late"]}
    assert [list(line.get_ydata()) for line in panels["loss"]] == [[3, 2], [4, 3]]
    assert list(panels["f1"][0].get_xdata()) == [1, 2] and panels["late"][0].get_ydata()[1] == 1


def logged(folder):
    """{tag: [(step, value), …]} as TensorBoard reads it."""
    log = EventAccumulator(str(folder))
    log.Reload()
    return {tag: [(each.step, each.value) for each in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


@pytest.mark.parametrize("place", ["local", "s3"])
def test_tensorboard_reads_the_history_from_the_log(place, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REFRESH", -1)
    copied, loop, losses = [], make_loop(), []
    watching = Call(after_epoch=lambda loop: copied.append(storage.list_files(url)), order=LAST,
                    after_step=lambda loop: losses.append(loop.mean_loss))
    with connected(storage.serve(tmp_path / "served")):
        storage.create_bucket("logs")
        url = "s3://logs/tensorboard" if place == "s3" else str(tmp_path / "tensorboard")
        loop.fit(3, [TensorBoard(f"{url}/"), LearningRate("linear"), watching])
        [name] = storage.list_files(url)
        data = storage.read(f"{url}/{name}")
    assert copied == [[name]] * 3
    (tmp_path / "read").mkdir()
    (tmp_path / "read" / name).write_bytes(data)
    found = logged(tmp_path / "read")
    assert [value for _, value in found.pop("running/loss")] == pytest.approx(losses)
    tags = {"train/loss": "train_loss", "val/loss": "val_loss", "learning_rate": "learning_rate",
            "train/samples_per_second": "train_samples_per_second"}
    assert found.keys() == tags.keys()
    for tag, column in tags.items():
        assert found[tag] == [(row["epoch"], pytest.approx(row[column])) for row in loop.history]


PASSWORD = "p@ss/word:1"


@contextmanager
def mail_server(login=False, **options):
    """An SMTP server on loopback; yields its port and the list of mails that came: (from, to, subject, text)."""
    mails = []

    class Mailbox:
        async def handle_DATA(self, server, session, envelope):
            mail = message_from_bytes(envelope.original_content)
            text = mail.get_payload(decode=True).decode().strip()
            mails.append((envelope.mail_from, *envelope.rcpt_tos, mail["Subject"], text))
            return "250 OK"

    def check(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"ann@x.org", PASSWORD.encode()), handled=False)

    options |= {"authenticator": check, "auth_required": True, "auth_require_tls": False} if login else {}
    server = Controller(Mailbox(), "127.0.0.1", free_port(), **options)
    server.start()
    try:
        yield server.port, mails
    finally:
        server.stop()


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """A server's TLS, by an authority that this process trusts."""
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return context


@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("safety", ["plain", "starttls", "smtps"])
def test_a_mail_tells_how_training_ended(safety, login, certified, monkeypatch):
    options = {"plain": {}, "starttls": {"tls_context": certified, "require_starttls": True},
               "smtps": {"ssl_context": certified}}[safety]
    user = f"{quote('ann@x.org')}:{quote(PASSWORD, safe='')}@" if login else ""
    with mail_server(login, **options) as (port, mails):
        monkeypatch.setenv("SMTP_URL", f"{'smtps' if safety == 'smtps' else 'smtp'}://{user}127.0.0.1:{port}")
        history = make_loop().fit(2, [Notify("ann@x.org", "Run: leaves", sender="lab@x.org")])
        with pytest.raises(ZeroDivisionError):
            make_loop().fit(1, [Notify("ann@x.org"), Call(after_step=at(3, fail))])
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items())
    assert mails == [
        ("lab@x.org", "ann@x.org", "Run: leaves ended after 10 steps", f"Run: leaves ended after 10 steps: {numbers}"),
        ("ann@x.org", "ann@x.org", "Training failed after 3 steps",
         "Training failed after 3 steps: ZeroDivisionError: on purpose")]


def test_a_mail_goes_through_amazon_ses_without_an_smtp_url(moto_env, monkeypatch):
    monkeypatch.delenv("SMTP_URL", raising=False)
    with connected(moto_env):
        with pytest.warns(UserWarning, match="was not sent: MessageRejected: .*not verified"):
            assert len(make_loop().fit(1, [Notify("bob@x.org")])) == 1
        boto3.client("ses").verify_email_identity(EmailAddress="bob@x.org")
        make_loop().fit(1, [Notify("ann@x.org", "Leaves", sender="bob@x.org")])
        with urllib.request.urlopen(moto_env["AWS_ENDPOINT_URL"] + "/moto-api/data.json") as answer:
            [mail] = json.load(answer)["ses"]["Message"]
    assert (mail["source"], mail["destinations"]["ToAddresses"]) == ("bob@x.org", ["ann@x.org"])
    assert mail["subject"] == "Leaves ended after 5 steps" and mail["body"].startswith(mail["subject"] + ": epoch 1, ")


@contextmanager
def web_server(answer=b"HTTP/1.0 200 OK\r\n\r\nok"):
    """A web server that answers so; yields the address of a webhook and the list of what was posted."""
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, self.headers["Content-Type"], json.loads(body)["text"]))
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook/hidden", posted
        finally:
            server.shutdown()
            thread.join()


def test_a_webhook_tells_how_training_ended():
    with web_server() as (url, posted):
        make_loop().fit(1, [Notify(url)])
        with pytest.raises(ZeroDivisionError):
            make_loop().fit(1, [Notify(url, "Leaves"), Call(before_fit=fail)])
    assert [values[:2] for values in posted] == [("/hook/hidden", "application/json")] * 2
    assert posted[0][2].startswith("Training ended after 5 steps: epoch 1, train_loss ")
    assert posted[1][2] == "Leaves failed after 0 steps: ZeroDivisionError: on purpose"


@pytest.mark.parametrize("to, smtp_url, reason", [
    ("http://127.0.0.1:CLOSED/hook/hidden", "", "Connection refused"),
    ("http://127.0.0.1:CLOSED/hook/hidden twice", "", "InvalidURL"),
    ("http://127.0.0.1:hidden/hook", "", "InvalidURL"),
    ("404 Not Found", "", "HTTPError: HTTP Error 404: Not Found"),
    ("garbage", "", "BadStatusLine"),
    ("ann@x.org", "smtp://ann:hidden@127.0.0.1:CLOSED", "Connection refused"),
    ("ann@x.org", "smtp://ann:hidden/1@127.0.0.1:1", "ValueError"),
    ("ann@x.org", "smtp://ann:hidden@127.0.0.1:{port}", "SMTPAuthenticationError"),
    ("ann@x.org", "smtp://ann:hidden-ü@127.0.0.1:{port}", "UnicodeEncodeError"),
    ("ann@x.org", "smtps://ann:hidden@127.0.0.1:{port}", "SSLError")])
def test_a_notice_that_cannot_be_sent_is_a_warning_that_tells_no_secret(to, smtp_url, reason, monkeypatch):
    answer = b"HTTP/1.0 404 Not Found\r\n\r\n" if to[0] == "4" else b"nonsense\r\n\r\n"
    with mail_server(login=True) as (port, mails), web_server(answer) as (url, _):
        closed = str(free_port())  # nobody listens there
        monkeypatch.setenv("SMTP_URL", smtp_url.format(port=port).replace("CLOSED", closed))
        notify, loop = Notify(url if to[0] in "4g" else to.replace("CLOSED", closed)), make_loop()
        with pytest.warns(UserWarning, match=f"The notice about the training was not sent: .*{reason}") as caught:
            assert loop.fit(2, [notify]) is loop.history and len(loop.history) == 2
            with pytest.raises(ZeroDivisionError):
                loop.fit(1, [notify, Call(after_epoch=fail)])
    said = [str(each.message) for each in caught if "Requiring AUTH" not in str(each.message)]  # aiosmtpd's own
    assert len(said) == 2 and not mails and not any("hidden" in text for text in said)


def test_no_password_is_sent_to_a_server_with_a_certificate_of_nobody_known(certified, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    for scheme, options in (("smtps", {"ssl_context": certified}), ("smtp", {"tls_context": certified})):
        with mail_server(login=True, **options) as (port, mails):
            monkeypatch.setenv("SMTP_URL", f"{scheme}://ann:word@127.0.0.1:{port}")
            with pytest.warns(UserWarning, match="CERTIFICATE_VERIFY_FAILED"):
                make_loop().fit(1, [Notify("ann@x.org")])
            assert not mails


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("every, options, expected", [
    ("epoch", {}, [5, 10]), ("end", {}, [10]), (2, {}, [2, 4, 5, 6, 8, 10]), (100, {}, [5, 10]),
    (3, {"accumulate": 2}, [4, 5, 7, 9, 10])])  # at the first step of the optimizer from there
def test_checkpoints_are_kept_as_often_as_was_asked_for(every, options, expected, tmp_path):
    loop = make_loop(**options)
    loop.fit(2, [Checkpoint(str(tmp_path), every=every, keep=99)])
    kept = checkpoints(str(tmp_path))
    assert sorted(kept) == expected
    assert all(torch.equal(kept[10]["parts"][0][name], weight) for name, weight in loop.model.state_dict().items())


@pytest.mark.parametrize("length", [{"num_epochs": 2}, {"num_steps": 7}])
def test_training_that_is_done_has_its_whole_history_when_started_again(length, tmp_path):
    loop, again = make_loop(), make_loop()
    for each in loop, again:
        each.fit(**length, callbacks=[Checkpoint(str(tmp_path), every=1)])
    assert again.history == loop.history and len(loop.history) == 2 and same(again.model, loop.model)


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("monitor, values, best", [
    ("val_accuracy", [0.1, 0.5, 0.3, 0.5, 0.2], 2), ("val_accuracy", [0.1, 0.5, 0.3, 0.2, 0.6], 5),
    ("val_loss", [1, 2, 3, 4, 5], 1), ("val_loss", [math.nan, math.nan, 3, math.nan, 4], 3)])
def test_the_model_of_the_best_epoch_is_kept(monitor, values, best, cut_off, tmp_path):
    models, loop = {}, make_loop()
    note = Call(after_epoch=lambda loop: models.update({loop.epoch: {
        name: tensor.clone() for name, tensor in loop.model.state_dict().items()}}))
    given = [note, script(monitor, values), Checkpoint(f"{tmp_path}/", every=1, best=monitor)]
    if cut_off:
        loop.fit(5, [*given, Call(after_step=at(18, cancel))])
        loop = make_loop()
    loop.fit(5, given)
    weights, config = experiment.load_model(f"{tmp_path}/best")
    assert config == {"epoch": best, monitor: values[best - 1]} and len(models) == 5
    assert all(torch.equal(weights[name], tensor) for name, tensor in models[best].items())
    assert not torch.equal(models[best]["body.weight"], models[best % 5 + 1]["body.weight"])


@pytest.mark.parametrize("make", [
    lambda url: LearningRate(plateau), lambda url: EarlyStopping(), lambda url: Checkpoint(url, best="val_loss")])
def test_a_column_that_is_not_measured_is_named(make, tmp_path):
    with pytest.raises(ValueError, match="no 'val_loss' in the history; there are: epoch, train_loss, "):
        make_loop(val=False).fit(1, [make(str(tmp_path))])


@pytest.mark.parametrize("make, message", [
    (lambda: LearningRate("cosin"), "no schedule 'cosin'; there are: constant, linear, cosine, and"),
    (lambda: LearningRate("linear", cycles=2), "cycles is for the cosine schedule"),
    (lambda: LearningRate("cosine", every="batch"), "\"step\" or \"epoch\", not 'batch'"),
    (lambda: Checkpoint("there", every="batch"), "\"epoch\", \"end\" or a number of steps, not 'batch'")])
def test_a_choice_that_there_is_not_is_named_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- all together


class Named(Net):
    """Takes its batches as dicts."""

    def forward(self, inputs, labels):
        return super().forward(inputs)


def everything(run, monitor):
    return [Checkpoint(f"{run.url}/checkpoints", every=2, best=monitor), EarlyStopping(monitor, patience=9), DryRun(4),
            LearningRate("cosine", warmup=2), SaveHistory(run), TensorBoard(f"{run.url}/log"), ClipGradients(norm=1),
            GradientStatistics(run, every=2), TerminateOnNaN(), ConstantPrediction(),
            Notify(f"http://127.0.0.1:{free_port()}")]


@pytest.mark.filterwarnings("ignore:The notice", "ignore:Epoch")
@pytest.mark.parametrize("kind", ["pairs", "dicts", "without validation", "adversaries"])
def test_all_callbacks_together_go_on_where_training_was_cut_off_and_in_a_second_fit(kind, tmp_path):
    def make():
        loop = make_loop((0.1, 0.2) if kind == "adversaries" else (0.1,), val=kind in ("pairs", "dicts"), accumulate=2)
        if kind == "dicts":
            torch.manual_seed(0)
            model, collate = Named(), lambda rows: dict(zip(("inputs", "labels"), default_collate(rows)))
            loop = TrainLoop(model, batches(collate_fn=collate), batches(1, collate_fn=collate), accumulate=2,
                             optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=loop.criterion)
        return loop

    monitor, bars = "val_loss" if kind in ("pairs", "dicts") else "train_loss", []
    runs = [experiment.Run(tmp_path / name) for name in ("whole", "cut_off")]
    whole, cut_off, again = make(), make(), make()
    torch.manual_seed(1)
    whole.fit(3, everything(runs[0], monitor))
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError):
        cut_off.fit(3, [*everything(runs[1], monitor), Call(after_step=at(8, fail), order=LAST)])
    assert len(rows_of(runs[1], "history")) == 1 and picture(runs[1], "gradients")
    again.fit(3, everything(runs[1], monitor))
    for loop, run in zip((whole, again), runs):
        loop.fit(1, [*everything(run, monitor), Call(after_fit=lambda loop: bars.append((loop.bar.n, loop.bar.total)))])
        assert [row["epoch"] for row in rows_of(run, "history")] == ["1", "2", "3", "4"]
        assert logged(f"{run.url}/log")["train/loss"][-1][0] == 4
    assert same(again.model, whole.model) and timeless(again.history) == timeless(whole.history)
    gradients = rows_of(runs[0], "gradients")
    assert gradients == rows_of(runs[1], "gradients") and {row["epoch"] for row in gradients} == {"1", "2", "3", "4"}
    assert bars == [(4, 4)] * 2
    one, two = (experiment.load_model(f"{run.url}/checkpoints/best") for run in runs)
    assert one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in one[0])


@pytest.mark.filterwarnings("ignore:The notice")
@pytest.mark.parametrize("order", [-LAST, -1, 30, LAST])
def test_what_fails_before_the_first_step_is_what_is_told_and_nothing_else(order, run):
    loop = make_loop()
    loaders = loop.train_loader, loop.val_loader
    with pytest.raises(ZeroDivisionError) as caught:
        loop.fit(1, [*everything(run, "val_loss"), Call(before_fit=fail, order=order)])
    assert caught.value.__context__ is None and (loop.train_loader, loop.val_loader) == loaders
    assert loop.fit(1, [*everything(run, "val_loss"), Call(before_fit=cancel, order=order)]) == []
    assert (loop.train_loader, loop.val_loader) == loaders


def test_a_missing_tensorboard_is_what_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard"):
        make_loop().fit(1, [TensorBoard(f"{run.url}/log"), SaveHistory(run)])

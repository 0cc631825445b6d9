"""What the callbacks of helpers/callbacks.py do, as their user sees it: rates, weights, files. All on the CPU."""

import copy
import csv
import io
import math
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from helpers import callbacks, experiment, storage, training
from helpers.callbacks import Checkpoint, ClipGradients, EarlyStopping, LearningRate, SaveHistory
from helpers.chapters.recipes import ConstantPrediction, DryRun, GradientStatistics, Notify, TensorBoard, TerminateOnNaN
from loops import LAST, Call, Stream, at, cancel, fail, make_loop, same, script, timeless
from servers import free_port


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


def logged(folder):
    """{tag: [(step, value), …]} as TensorBoard reads it."""
    log = EventAccumulator(str(folder))
    log.Reload()
    return {tag: [(each.step, each.value) for each in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def watch(rates, which=0):
    """Notes the rate of each step, before it changes."""
    return Call(after_step=lambda loop: rates.append(loop.optimizers[which].param_groups[0]["lr"]), order=-1)


COSINE = [0.1, 0.09755283, 0.09045085, 0.07938926, 0.06545085, 0.05, 0.03454915, 0.02061074, 0.00954915, 0.00244717]
WARM = [0.1 / 3, 0.2 / 3, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]


def test_the_learning_rate_follows_its_schedule():
    for schedule, options, expected in (
        ("constant", {"warmup": 3}, [0.025, 0.05, 0.075] + [0.1] * 7),
        ("linear", {}, [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]),
        ("linear", {"warmup": 2}, WARM),
        ("linear", {"warmup": 0.2}, WARM),
        ("cosine", {}, COSINE),
        ("cosine", {"warmup": 2, "cycles": 2}, WARM[:2] + [0.1, 0.08535534, 0.05, 0.01464466] * 2),
        (lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.5), {}, [0.1] * 4 + [0.05] * 4 + [0.025] * 2),
    ):
        rates = []
        history = make_loop().fit(2, [LearningRate(schedule, **options), watch(rates)])
        assert rates == pytest.approx(expected, rel=1e-5)
        assert history[0]["learning_rate"] == pytest.approx(expected[5], rel=1e-5)
    rates = []
    make_loop().fit(4, [LearningRate(plateau, monitor="epoch"), watch(rates)])  # which never gets smaller
    assert rates[::5] == [0.1, 0.1, 0.05, 0.025] and len(set(rates)) == 3


def test_the_schedule_counts_steps_of_the_optimizer_and_begins_anew_in_a_second_fit():
    rates = []
    make_loop(accumulate=2).fit(2, [LearningRate("linear"), watch(rates)])
    assert rates == pytest.approx([x / 60 for x in (6, 6, 5, 5, 4, 3, 3, 2, 2, 1)])
    rates.clear()
    make_loop().fit(num_steps=7, callbacks=[LearningRate("linear"), watch(rates)])
    assert rates == pytest.approx([x / 70 for x in range(7, 0, -1)])
    rates.clear()
    first, loop = [], make_loop(rates=(0.4, 0.1), val=None)
    for _ in range(2):  # each optimizer from its own rate
        loop.fit(1, [LearningRate("linear"), watch(first), watch(rates, 1)])
    loop.train_loader = DataLoader(Stream(), 4)
    loop.fit(num_steps=5, callbacks=[LearningRate("linear"), watch(first), watch(rates, 1)])
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02] * 3) and first == pytest.approx([4 * x for x in rates])
    with pytest.raises(ValueError, match="with a loader that has no length"):
        loop.fit(1, [LearningRate("linear")])


def test_clipped_gradients_train_as_those_clipped_in_a_loop_by_hand():
    everywhere, body = (lambda model: model.parameters()), (lambda model: list(model.body.parameters()))
    for options, weights, clip in (
        ({"norm": 0.05}, everywhere, nn.utils.clip_grad_norm_),
        ({"value": 0.01}, everywhere, nn.utils.clip_grad_value_),
        ({"norm": 1e-3}, body, nn.utils.clip_grad_norm_),
    ):
        loop, plain, free = (make_loop(val=None) for _ in range(3))
        torch.manual_seed(1)
        plain.model.train()
        for inputs, targets in plain.train_loader:
            plain.criterion(plain.model(inputs), targets).backward()
            clip(weights(plain.model), *options.values())
            plain.optimizers[0].step()
            plain.optimizers[0].zero_grad()
        clipping = ClipGradients(**options, weights=body(loop.model) if weights is body else None)
        for each, given in (loop, [clipping]), (free, []):
            torch.manual_seed(1)
            each.fit(1, given)
        assert same(loop.model, plain.model) and not same(loop.model, free.model)


def test_early_stopping_wants_more_than_the_threshold_and_is_not_misled_by_nan():
    for monitor, values, threshold, epochs in (
        ("val_loss", [1, 0.95, 0.92, 0.8, 0.7, 0.6], 0.1, 3),
        ("val_loss", [1, 0.95, 0.85, 0.8, 0.7, 0.6], 0.1, 6),
        ("val_accuracy", [0.5, 0.4, 0.6, 0.6, 0.7, 0.6], 0, 6),
        ("val_loss", [math.nan] * 6, 0, 3),
        ("val_loss", [math.nan, 3, math.nan, 2, math.nan, math.nan], 0, 6),
    ):
        stop = EarlyStopping(monitor, patience=2, threshold=threshold)
        assert len(make_loop(val=None).fit(6, [stop, script(monitor, values)])) == epochs, (monitor, values)


def test_training_that_was_stopped_early_stays_so_when_started_again(tmp_path):
    loop, again = make_loop(val=None), make_loop(val=None)
    given = [script("val_loss", [2, 1, 3, 3, 0, 0]), EarlyStopping(patience=2), Checkpoint(str(tmp_path))]
    assert len(loop.fit(6, given)) == len(again.fit(6, given)) == 4 and again.steps == 20
    assert len(loop.fit(1, given)) == 5  # but asked to train on, it does


@pytest.mark.filterwarnings("ignore:Training ended")
def test_no_checkpoint_holds_weights_that_are_no_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "REFRESH", 10)  # looks at the first step of an epoch only
    spoil = Call(after_backward=lambda loop: loop.steps == 6 and loop.model.body.weight.grad.fill_(math.nan))
    for every, guard, last in (1, [], 6), ("epoch", [], 5), ("epoch", [TerminateOnNaN()], 5), ("end", [], 0):
        loop, url = make_loop(), f"{tmp_path}/{every}{len(guard)}"
        loop.fit(3, [Checkpoint(url, every=every, keep=9), spoil, *guard])
        assert not loop.model.body.weight.isfinite().any() and loop.steps == (10 if guard else 15)
        kept = checkpoints(url)
        assert max(kept, default=0) == last
        assert all(weight.isfinite().all() for state in kept.values() for weight in state["parts"][0].values())


def test_the_history_and_its_curves_are_saved_however_training_ends(tmp_path):
    for moment, end, epochs in (("after_step", at(12, fail), 2), ("after_epoch", at(15, cancel), 3)):
        loop, run = make_loop(), experiment.Run(tmp_path / moment)
        with pytest.raises(ZeroDivisionError) if moment == "after_step" else nullcontext():
            loop.fit(3, [SaveHistory(run), LearningRate("cosine"), Call(**{moment: end}, order=5)])
        assert len(loop.history) == epochs
        assert rows_of(run, "history") == [{name: str(value) for name, value in row.items()} for row in loop.history]
        width, height = picture(run, "history")
        assert width > 3 * height  # loss, samples per second and learning rate, side by side


def test_curves_show_training_and_validation_of_a_number_in_one_panel():
    history = [
        {"epoch": 1, "train_loss": 3.0, "val_loss": 4.0, "val_classes": [1, 2], "note": "a"},
        {"epoch": 2, "train_loss": 2.0, "val_loss": 3.0, "val_classes": [1, 2], "late": 1},
    ]
    panels = {axis.get_title(): axis.lines for axis in callbacks.plot_history(history).axes}
    labels = {title: [line.get_label() for line in lines] for title, lines in panels.items()}
    assert labels == {"loss": ["train", "val"], "late": ["late"]}
    assert [list(line.get_ydata()) for line in panels["loss"]] == [[3, 2], [4, 3]]


def test_what_there_is_not_is_named(tmp_path):
    for make, message in (
        (lambda: LearningRate(plateau), "no 'val_loss' in the history; there are: epoch, train_loss, "),
        (lambda: EarlyStopping(), "no 'val_loss' in the history"),
        (lambda: Checkpoint(tmp_path, best="val_loss"), "no 'val_loss' in the history"),
        (lambda: LearningRate("cosin"), "no schedule 'cosin'; there are: constant, linear, cosine, and"),
        (lambda: Checkpoint(tmp_path, every="batch"), '"epoch", "end" or a number of steps, not \'batch\''),
    ):
        with pytest.raises(ValueError, match=message):
            make_loop(val=None).fit(1, [make()])


def test_checkpoints_are_kept_as_often_as_was_asked_for(tmp_path):
    for every, options, expected in (
        ("epoch", {}, [5, 10]),
        ("end", {}, [10]),
        (2, {}, [2, 4, 5, 6, 8, 10]),
        (100, {}, [5, 10]),
        (3, {"accumulate": 2}, [4, 5, 7, 9, 10]),  # at the first step of the optimizer from there
    ):
        loop, again, url = make_loop(**options), make_loop(**options), f"{tmp_path}/{every}"
        loop.fit(2, [Checkpoint(url, every=every, keep=99)])
        kept = checkpoints(url)
        assert sorted(kept) == expected
        assert all(torch.equal(kept[10]["parts"][0][name], weight) for name, weight in loop.model.state_dict().items())
        again.fit(2, [Checkpoint(url, every=every, keep=99)])  # what is done has its whole history when started again
        assert again.history == loop.history and len(loop.history) == 2 and same(again.model, loop.model)


def test_the_model_of_the_best_epoch_is_kept(tmp_path):
    for monitor, values, best in (
        ("val_accuracy", [0.1, 0.5, 0.3, 0.5, 0.2], 2),
        ("val_accuracy", [0.1, 0.5, 0.3, 0.2, 0.6], 5),
        ("val_loss", [math.nan, math.nan, 3, math.nan, 4], 3),
    ):
        models, loop, url = {}, make_loop(), f"{tmp_path}/{best}"
        note = Call(after_epoch=lambda loop: models.update({loop.epoch: copy.deepcopy(loop.model.state_dict())}))
        loop.fit(5, [note, script(monitor, values), Checkpoint(f"{url}/", best=monitor)])
        weights, config = experiment.load_model(f"{url}/best")
        assert config == {"epoch": best, monitor: values[best - 1]} and len(models) == 5
        assert all(torch.equal(weights[name], tensor) for name, tensor in models[best].items())
        assert not torch.equal(models[best]["body.weight"], models[best % 5 + 1]["body.weight"])


def everything(run):
    return [
        Checkpoint(f"{run.url}/checkpoints", every=2, best="val_loss"),
        EarlyStopping(patience=9),
        DryRun(4),
        LearningRate("cosine", warmup=2),
        SaveHistory(run),
        TensorBoard(f"{run.url}/log"),
        ClipGradients(norm=1),
        GradientStatistics(run, every=2),
        TerminateOnNaN(),
        ConstantPrediction(),
        Notify(f"http://127.0.0.1:{free_port()}"),
    ]


@pytest.mark.filterwarnings("ignore:The notice", "ignore:Epoch")
def test_all_callbacks_together_go_on_where_training_was_cut_off_and_in_a_second_fit(tmp_path):
    bars, runs = [], [experiment.Run(tmp_path / name) for name in ("whole", "cut_off")]
    whole, cut_off, again = (make_loop((0.1, 0.2), accumulate=2) for _ in range(3))
    torch.manual_seed(1)
    whole.fit(3, everything(runs[0]))
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError):
        cut_off.fit(3, [*everything(runs[1]), Call(after_step=at(8, fail), order=LAST)])
    assert len(rows_of(runs[1], "history")) == 1 and picture(runs[1], "gradients")
    note = Call(after_fit=lambda loop: bars.append((loop.bar.n, loop.bar.total)))
    again.fit(3, [*everything(runs[1]), note])
    for loop, run in zip((whole, again), runs):
        loop.fit(1, [*everything(run), note])
        assert [row["epoch"] for row in rows_of(run, "history")] == ["1", "2", "3", "4"]
        logs = [logged(f"{run.url}/log/{name}") for name in storage.list_files(f"{run.url}/log")]
        assert 4 in {step for log in logs for step, _ in log.get("train/loss", ())}
    assert same(again.model, whole.model) and timeless(again.history) == timeless(whole.history)
    gradients = rows_of(runs[0], "gradients")
    assert gradients == rows_of(runs[1], "gradients") and {row["epoch"] for row in gradients} == {"1", "2", "3", "4"}
    assert bars == [(12, 12), (4, 4), (4, 4)]
    one, two = (experiment.load_model(f"{run.url}/checkpoints/best") for run in runs)
    assert one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in one[0])

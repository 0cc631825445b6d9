"""The callbacks that nearly every training wants: see training.Callback for how to write one of your own."""

import json
import math
import re
from collections.abc import Mapping
from functools import partial

import numpy as np
import safetensors.torch
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from helpers import experiment, storage
from helpers.training import Callback, CancelFit


class LearningRate(Callback):
    """Schedule the learning rate over the whole fit and record it in the history.

    schedule: "constant", "linear" or "cosine", from the optimizer's own rate down to 0, `cycles` times (Loshchilov &
    Hutter 2016, https://arxiv.org/abs/1608.03983), after a linear warm-up of `warmup` steps (below 1: a fraction of
    all). Or a function that makes any torch scheduler for an optimizer; it moves by the step, except that a
    ReduceLROnPlateau looks at `monitor` in the history after every epoch.
    """

    def __init__(self, schedule, warmup=0, cycles=1, monitor="val_loss"):
        if not callable(schedule) and schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"There is no schedule {schedule!r}; there are: constant, linear, cosine, and a function.")
        self.schedule, self.warmup, self.cycles, self.monitor = schedule, warmup, cycles, monitor

    def before_fit(self, loop):
        make = self.schedule
        if not callable(make):
            if math.isinf(loop.total_steps):
                way_out = "with a loader that has no length, use fit(num_steps=…)"
                raise ValueError(f"A schedule must know where training ends: {way_out}.")
            batches = min(loop.epoch_batches, loop.total_steps)
            total = math.ceil(loop.total_steps * math.ceil(batches / loop.accumulate) / batches)
            make = partial(LambdaLR, lr_lambda=lambda move: self._factor(min(move, total - 1), total))
        self.schedulers = [make(optimizer) for optimizer in loop.optimizers]

    def _factor(self, move, total):
        """The rate relative to the optimizer's own."""
        warmup = self.warmup if self.warmup >= 1 else round(self.warmup * total)
        if move < warmup:
            return (move + 1) / (warmup + 1)
        cycle = math.ceil(max(total - warmup, 1) / self.cycles)
        done = (move - warmup) % cycle / cycle
        return {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]

    def after_step(self, loop):
        for scheduler in self.schedulers if loop.stepped else ():
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()

    def after_epoch(self, loop):
        loop.history[-1]["learning_rate"] = loop.optimizers[0].param_groups[0]["lr"]  # at the epoch's end
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(column(loop.history[-1], self.monitor))

    def state_dict(self):
        return [scheduler.state_dict() for scheduler in self.schedulers]

    def load_state_dict(self, states):
        for scheduler, state in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(state)


class ClipGradients(Callback):
    """Clip the gradients of all weights, or of these: their joint norm, or each one's absolute value."""

    def __init__(self, norm=None, value=None, weights=None):
        self.norm, self.value, self.weights = norm, value, weights

    def after_backward(self, loop):
        weights = self.weights or loop.weights
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(weights, self.value)
        if self.norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, self.norm)


def best_epoch(history, monitor, threshold=0.0):
    """The index of the last row in which `monitor` improved on all earlier ones by more than `threshold`."""
    sign, best = (-1 if experiment.smaller_is_better(monitor) else 1), 0
    values = [column(row, monitor) for row in history]
    for i, value in enumerate(values):
        if sign * (value - values[best]) > threshold or math.isnan(values[best]) and not math.isnan(value):
            best = i
    return best


def column(row, name):
    if name not in row:
        raise ValueError(f"There is no {name!r} in the history; there are: {', '.join(row)}.")
    return row[name]


class EarlyStopping(Callback):
    """End training when `monitor` in the history has not improved by more than `threshold` for `patience` epochs.

    Whether smaller or larger is better follows from its name: see experiment.smaller_is_better.
    """

    order = 100  # after those that save what the epoch produced

    def __init__(self, monitor="val_loss", patience=3, threshold=0.0):
        self.monitor, self.patience, self.threshold = monitor, patience, threshold

    def before_fit(self, loop):
        if loop.history and not hasattr(loop, "epoch"):  # resumed from a checkpoint: training may have ended there
            self.after_epoch(loop)

    def after_epoch(self, loop):
        if len(loop.history) - 1 - best_epoch(loop.history, self.monitor, self.threshold) >= self.patience:
            raise CancelFit


class SaveHistory(Callback):
    """Write the history to the run's history.csv after every epoch, and its curves to plots/history.png at the end."""

    order = 20

    def __init__(self, run):
        self.run = run

    def after_epoch(self, loop):
        self.run.save_history(loop.history)

    def after_fit(self, loop):
        if loop.history:
            self.after_epoch(loop)  # a callback that ended training may have run before this one
            self.run.save_figure("history", plot_history(loop.history))

    after_error = after_fit


def plot_history(history):
    """A figure with the losses and every other measured number over the epochs, a panel each."""
    from matplotlib import pyplot

    names = [name for name, value in history[-1].items() if isinstance(value, (int, float)) and name != "epoch"]
    panels = {}  # {quantity: [its columns on training, validation and test data]}
    colors = {"val": "tab:orange", "test": "tab:green"}
    for name in names:
        panels.setdefault(re.sub("^(train|val|test)_", "", name).replace("_", " "), []).append(name)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False)
    pyplot.close(figure)
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for name in columns:
            data, epochs = name.split("_")[0], [row["epoch"] for row in history]
            values = [row.get(name) for row in history]
            axis.plot(epochs, values, marker=".", label=data, color=colors.get(data, "tab:blue"))
        axis.set(title=title, xlabel="epoch")
        if len(columns) > 1:
            axis.legend(frameon=False)
    figure.tight_layout()
    return figure


class Checkpoint(Callback):
    """Save the complete training state under a URL, and resume from the newest checkpoint when training starts again.

    Training that was killed and restarted ends with the same weights and history, to the bit, as one that was not
    (augmentation in DataLoader workers excepted). A checkpoint is one object, there whole or not at all.
    every: "epoch", a number of steps (and every epoch), or "end". keep: how many of the newest to keep. best: a column
    of the history; the model of the epoch in which it was best is kept under {url}/best, for experiment.load_model.
    """

    order = 50  # after callbacks that change the history, before those that end training

    def __init__(self, url, every="epoch", keep=2, best=None):
        if every not in ("epoch", "end") and not isinstance(every, int):
            raise ValueError(f'every is "epoch", "end" or a number of steps, not {every!r}')
        self.url, self.every, self.keep, self.best = str(url).rstrip("/"), every, keep, best

    def before_fit(self, loop):
        names = self._names()
        while names:
            try:
                state = state_from_safetensors(storage.read(f"{self.url}/{names[-1]}"))
            except safetensors.SafetensorError:  # truncated, where writes are not atomic: take the one before
                names.pop()
                continue
            loop.load_state_dict(state)
            self._delete_old(names)  # training may have been killed before it did so
            break

    def after_step(self, loop):
        within = loop.batch < loop.epoch_batches and loop.steps < loop.last_step  # otherwise after_epoch saves
        if isinstance(self.every, int) and within and loop.stepped and loop.steps % self.every < loop.accumulate:
            self._save(loop)  # at the next optimizer step, when no gradients are pending

    def after_epoch(self, loop):
        if self.best and best_epoch(loop.history, self.best) == len(loop.history) - 1:
            row = loop.history[-1]
            experiment.save_model(loop.model, f"{self.url}/best", epoch=row["epoch"], **{self.best: row[self.best]})
        if self.every != "end":
            self._save(loop)

    def after_fit(self, loop):
        if self.every == "end" and hasattr(loop, "total"):  # something was trained
            self._save(loop)

    def _save(self, loop):
        state = loop.state_dict()
        whole = all(weight.isfinite().all() for weight in loop.model.parameters())  # NaN cannot be trained on
        if whole and loop.accelerator.is_main_process:
            storage.write(f"{self.url}/step_{loop.steps:09d}_{loop.batch:09d}.safetensors", state_to_safetensors(state))
            self._delete_old(self._names())

    def _delete_old(self, names):
        for name in names[: -self.keep]:
            storage.delete(f"{self.url}/{name}")  # of several processes, only the first one does

    def _names(self):
        return [name for name in storage.list_files(self.url) if re.fullmatch(r"step_\d+_\d+\.safetensors", name)]


def state_to_safetensors(state):
    """Nested dicts, lists, tuples, arrays, tensors and plain values as one safetensors file: no pickle in a bucket."""
    tensors = {}

    def to_json(value):
        if isinstance(value, (torch.Tensor, np.ndarray)):
            name = str(len(tensors))
            tensors[name] = torch.as_tensor(value).detach()
            return {"tensor" if isinstance(value, torch.Tensor) else "array": name}
        if isinstance(value, Mapping):
            return {"dict": [[to_json(key), to_json(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [to_json(item) for item in value]}
        return [to_json(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(to_json(state))  # fills tensors
    return experiment.to_safetensors({"state": torch.tensor(list(text.encode()), dtype=torch.uint8), **tensors})


def state_from_safetensors(data):
    """The state that `state_to_safetensors` wrote, its tensors on the CPU."""
    tensors = safetensors.torch.load(data)
    kinds = {"tensor": tensors.get, "array": lambda name: tensors[name].numpy(), "tuple": tuple, "dict": dict}

    def from_json(value):
        [(kind, item)] = value.items()
        return kinds[kind](item)

    return json.loads(bytes(tensors["state"].tolist()), object_hook=from_json)

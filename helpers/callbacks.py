"""What hangs on the training loop: plain classes with methods named after the moment they run (training.MOMENTS).

One of your own is as short as this; `order` says when its turn is among the others:

    class Tell(Callback):
        def after_epoch(self, loop):
            print(loop.history[-1])
"""

import itertools
import json
import math
import os
import re
import smtplib
import ssl
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Mapping
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import numpy as np
import safetensors.torch
import torch
from botocore.exceptions import BotoCoreError, ClientError
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from helpers import experiment
from helpers.training import MOMENTS, Callback, CancelFit


class Call(Callback):
    """Any function of the loop at any moment: Call(after_epoch=lambda loop: print(loop.history[-1]))."""

    def __init__(self, order=0, **functions):
        if unknown := functions.keys() - set(MOMENTS):
            raise ValueError(f"There is no moment {', '.join(sorted(unknown))}; there are: {', '.join(MOMENTS)}.")
        self.order = order
        vars(self).update(functions)


class DryRun(Callback):
    """Train and validate on the first few batches of each epoch only, to see that everything works before it takes long.

    A checkpoint that it writes is one to go on from, as any other: give it a URL of its own.
    """

    order = -100  # before anything looks at the loaders

    def __init__(self, batches=2):
        self.batches, self.whole = batches, None

    def before_fit(self, loop):
        self.whole = loop.train_loader, loop.val_loader
        loop.train_loader, loop.val_loader = (loader and _First(loader, self.batches) for loader in self.whole)
        if loop.num_steps:
            loop.num_steps = min(loop.num_steps, self.batches)
            loop.last_step = loop.steps + loop.num_steps

    def after_fit(self, loop):
        if self.whole:
            loop.train_loader, loop.val_loader = self.whole

    after_error = after_fit


class _First:
    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def __len__(self):
        return min(len(self.loader), self.batches)

    def __iter__(self):
        return itertools.islice(self.loader, self.batches)

    def __getattr__(self, name):
        value = getattr(self.loader, name)
        return _First(value, self.batches) if name == "batch_sampler" else value  # from which an epoch is taken up


# ------------------------------------------------------------------------------------------ learning rate, gradients


class LearningRate(Callback):
    """A learning rate that follows a schedule over the whole fit, and stands in the history.

    schedule: "constant", "linear" or "cosine", down from the optimizer's own rate to 0, `cycles` times (warm restarts:
    Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983), after `warmup` steps (or, below 1, that part of all) of
    a linear rise. Or a function that makes any torch scheduler for an optimizer; one for a plateau moves by epochs and
    looks at `monitor` in the history. every: "step" or "epoch", in which then `warmup` counts, too.
    """

    SCHEDULES = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x,
                 "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}  # x: what part of the way is done

    def __init__(self, schedule, warmup=0, cycles=1, every="step", monitor="val_loss"):
        if not callable(schedule) and schedule not in self.SCHEDULES:
            raise ValueError(f"There is no schedule {schedule!r}; "
                             f"there are: {', '.join(self.SCHEDULES)}, and a function.")
        if every not in ("step", "epoch"):
            raise ValueError(f'every is "step" or "epoch", not {every!r}.')
        self.schedule, self.warmup, self.cycles, self.every, self.monitor = schedule, warmup, cycles, every, monitor

    def before_fit(self, loop):
        make = self.schedule if callable(self.schedule) else lambda optimizer: LambdaLR(optimizer, self._factor)
        moves = math.ceil(len(loop.train_loader) / loop.accumulate) if self.every == "step" else 1  # in an epoch
        self.total = math.ceil(loop.total_steps * moves / len(loop.train_loader))
        self.schedulers = [make(optimizer) for optimizer in loop.optimizers]
        if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in self.schedulers):
            self.every = "epoch"

    def _factor(self, step):
        warmup = self.warmup if self.warmup >= 1 else round(self.warmup * self.total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(self.total - warmup, 1)
        return self.SCHEDULES[self.schedule](min(step - warmup, left - 1) * self.cycles % left / left)

    def after_step(self, loop):
        if self.every == "step" and loop.stepped:
            for scheduler in self.schedulers:
                scheduler.step()

    def after_epoch(self, loop):
        loop.history[-1]["learning_rate"] = loop.optimizers[0].param_groups[0]["lr"]  # at the epoch's end
        if self.every == "epoch":
            for scheduler in self.schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(*[_of(loop.history[-1], self.monitor)] * plateau)

    def state_dict(self):
        return [scheduler.state_dict() for scheduler in self.schedulers]

    def load_state_dict(self, states):
        for scheduler, state in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(state)


class ClipGradients(Callback):
    """Scale the gradients of a step down to this norm (of all together), or cut each at this value; of all weights, or
    of these (list(model.embedding.parameters())).
    """

    def __init__(self, norm=None, value=None, weights=None):
        self.norm, self.value, self.weights = norm, value, weights

    def after_backward(self, loop):
        weights = self.weights or loop.weights
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(weights, self.value)
        if self.norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, self.norm)


class GradientStatistics(Callback):
    """How large the gradients of each weight are: a row per weight, every so many steps, to the run's gradients.csv, and
    at the end a plot of their distribution. Vanishing and exploding gradients show as boxes far from the others.
    """

    order = -1  # before they are clipped
    QUANTILES = 0.05, 0.25, 0.5, 0.75, 0.95  # of the absolute values; the whiskers, box and line of the plot
    MOST = 100_000  # values looked at of one weight: the quantiles of a sample are near enough

    def __init__(self, run, every=50):
        self.run, self.every, self.rows = run, every, []

    def after_backward(self, loop):
        if loop.steps % self.every >= loop.accumulate:  # of accumulated batches, the last one alone comes here
            return
        names = {id(weight): name for name, weight in loop.model.named_parameters()}
        for weight in loop.weights:
            if weight.grad is not None:
                values = weight.grad.detach().float().flatten()
                some = values[::math.ceil(len(values) / self.MOST)].abs()
                quantiles = torch.quantile(some, torch.tensor(self.QUANTILES, device=some.device))
                moments = torch.stack([values.norm(), values.mean(), values.std(correction=0), values.abs().max()])
                place = loop.epoch, loop.steps, names.get(id(weight), "another")  # one of the criterion
                self.rows.append([*place, *moments.tolist(), *quantiles.tolist()])

    def after_epoch(self, loop):
        columns = ("epoch", "step", "weight", "norm", "mean", "std", "max", *(f"quantile_{q}" for q in self.QUANTILES))
        self.run.save_history([dict(zip(columns, row)) for row in self.rows], "gradients")

    def after_fit(self, loop):
        from matplotlib import pyplot

        if not self.rows:
            return
        self.after_epoch(loop)  # of one that was broken off
        last = [row for row in self.rows if row[0] == self.rows[-1][0]]  # of the last epoch, the mean of its rows
        names = list(dict.fromkeys(row[2] for row in last))
        found = [np.mean([row[-len(self.QUANTILES):] for row in last if row[2] == name], axis=0) for name in names]
        boxes = [dict(zip(("whislo", "q1", "med", "q3", "whishi"), row), label=name) for name, row in zip(names, found)]
        figure, axis = pyplot.subplots(figsize=(8, 1 + 0.25 * len(names)))
        pyplot.close(figure)
        axis.bxp(boxes, orientation="horizontal", showfliers=False)
        axis.set(xlabel="size of the gradients, last epoch (5, 25, 50, 75, 95 %)", xscale="log")
        axis.invert_yaxis()
        self.run.save_figure("gradients", figure)

    after_error = after_fit

    def state_dict(self):
        return self.rows

    def load_state_dict(self, rows):
        self.rows = rows


# ------------------------------------------------------------------------------------------------ stop, and be warned


def best_epoch(history, monitor, threshold=0.0):
    """The index of the row in which `monitor` was last better than ever before, by more than `threshold`."""
    sign, best = (-1 if experiment.smaller_is_better(monitor) else 1), 0
    values = [_of(row, monitor) for row in history]
    for i, value in enumerate(values):
        if sign * (value - values[best]) > threshold or math.isnan(values[best]) and not math.isnan(value):
            best = i
    return best


def _of(row, name):
    if name not in row:
        raise ValueError(f"There is no {name!r} in the history; there are: {', '.join(row)}.")
    return row[name]


class EarlyStopping(Callback):
    """End training when `monitor` in the history did not get better, by more than `threshold`, for `patience` epochs.

    Whether less or more is better follows from its name: see experiment.smaller_is_better.
    """

    order = 100  # after those that keep what the epoch brought

    def __init__(self, monitor="val_loss", patience=3, threshold=0.0):
        self.monitor, self.patience, self.threshold = monitor, patience, threshold

    def before_fit(self, loop):
        if loop.history and not hasattr(loop, "epoch"):  # of a checkpoint: it may have ended there
            self.after_epoch(loop)

    def after_epoch(self, loop):
        if len(loop.history) - 1 - best_epoch(loop.history, self.monitor, self.threshold) >= self.patience:
            raise CancelFit


class TerminateOnNaN(Callback):
    """End training when its loss is no number any more: within an epoch at the next look of the progress bar."""

    order = 10  # before a checkpoint would keep it

    def after_step(self, loop):
        if loop.accelerator.num_processes == 1 and not math.isfinite(loop.mean_loss):  # several must stop together
            self._stop(loop)

    def after_epoch(self, loop):
        if not math.isfinite(loop.history[-1]["train_loss"]):
            self._stop(loop)

    def _stop(self, loop):
        warnings.warn(f"Training ended: at step {loop.steps} its loss is {loop.mean_loss}. Try a lower learning rate, "
                      "ClipGradients(norm=1), or look for such values in the data.")
        raise CancelFit


class ConstantPrediction(Callback):
    """Warn when a classifier says the same of all validation samples: it has collapsed, or has not learned at all.

    Puts the number of classes it does say into the history, as val_predicted_classes.
    """

    def before_fit(self, loop):
        from helpers.evaluation import PredictedClasses  # imports torchmetrics, which takes long: only where it is used

        loop.add_metrics({"predicted_classes": PredictedClasses()})

    def after_epoch(self, loop):
        if loop.history[-1].get("val_predicted_classes") == 1:
            warnings.warn(f"Epoch {loop.epoch}: the model predicts the same class for every validation sample.")


# --------------------------------------------------------------------------------------------------- keep, and tell


class SaveHistory(Callback):
    """The history to the run's history.csv after every epoch, and its curves to plots/history.png at the end."""

    order = 20

    def __init__(self, run):
        self.run = run

    def after_epoch(self, loop):
        self.run.save_history(loop.history)

    def after_fit(self, loop):
        if loop.history:
            self.after_epoch(loop)  # one that ended training may have kept the last row from it
            self.run.save_figure("history", plot_history(loop.history))

    after_error = after_fit


def plot_history(history):
    """A figure of the losses, and one beside it for every other number that was measured, over the epochs."""
    from matplotlib import pyplot

    names = [name for name, value in history[-1].items() if isinstance(value, (int, float)) and name != "epoch"]
    panels = {}  # {what is measured: [the columns of it, on training and validation data]}
    for name in names:
        panels.setdefault(re.sub("^(train|val)_", "", name).replace("_", " "), []).append(name)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False)
    pyplot.close(figure)
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for name in columns:
            axis.plot([row["epoch"] for row in history], [row.get(name) for row in history], marker=".",
                      label=name.split("_")[0], color="tab:orange" if name.startswith("val_") else "tab:blue")
        axis.set(title=title, xlabel="epoch")
        if len(columns) > 1:
            axis.legend(frameon=False)
    figure.tight_layout()
    return figure


class TensorBoard(Callback):
    """The history and the running loss as a TensorBoard log, at any fsspec URL: tensorboard --logdir URL.

    Needs the package tensorboard. It is written beside this process and copied after every epoch.
    """

    order = 20

    def __init__(self, url):
        self.url, self.writer = str(url).rstrip("/"), None

    def before_fit(self, loop):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, and the package

        self.folder, self.last = tempfile.TemporaryDirectory(), None
        self.writer = SummaryWriter(self.folder.name)

    def after_step(self, loop):
        if loop.mean_loss is not self.last:  # there was a look
            self.last = loop.mean_loss
            self.writer.add_scalar("running/loss", self.last, loop.steps)

    def after_epoch(self, loop):
        for name, value in loop.history[-1].items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(re.sub("^(train|val)_", r"\1/", name), value, loop.epoch)
        self._copy()

    def after_fit(self, loop):
        if self.writer:  # or an earlier callback's before_fit failed
            self.writer.close()
            self._copy()
            self.folder.cleanup()
            self.writer = None

    after_error = after_fit

    def _copy(self):
        self.writer.flush()
        for path in Path(self.folder.name).iterdir():
            experiment.write(f"{self.url}/{path.name}", path.read_bytes())


class Notify(Callback):
    """Tell how training ended, well or with an error, at an e-mail address or a webhook (https://…, given {"text": …}).

    Mail goes through SMTP_URL (smtp://user:password@host:587, or smtps://), where the environment has it, otherwise
    through Amazon SES. A webhook's address is a secret: take it from the environment. A notice that cannot be sent is a
    warning, no error.
    """

    order = 200  # when all else is done

    def __init__(self, to, subject="Training", sender=None):
        self.to, self.subject, self.sender = to, subject, sender or to

    def after_fit(self, loop):
        row = loop.history[-1] if loop.history else {}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, (int, float)))
        self._send(loop, f"{self.subject} ended after {loop.steps} steps", numbers)

    def after_error(self, loop):
        error = sys.exception()
        self._send(loop, f"{self.subject} failed after {loop.steps} steps", f"{type(error).__name__}: {error}")

    def _send(self, loop, title, text):
        if not loop.accelerator.is_main_process:
            return
        try:
            if self.to.startswith(("https://", "http://")):
                body, kind = json.dumps({"text": f"{title}: {text}"}).encode(), {"Content-Type": "application/json"}
                urllib.request.urlopen(urllib.request.Request(self.to, body, kind), timeout=20).close()
            elif url := os.environ.get("SMTP_URL"):
                self._by_smtp(urlsplit(url), title, text)
            else:
                boto3.client("ses").send_email(
                    Source=self.sender, Destination={"ToAddresses": [self.to]},
                    Message={"Subject": {"Data": title}, "Body": {"Text": {"Data": f"{title}: {text}"}}})
        except Exception as error:
            harmless = isinstance(error, (OSError, smtplib.SMTPException, BotoCoreError, ClientError))
            said = type(error).__name__ + f": {error}" * harmless  # another one may quote the address or the password
            warnings.warn(f"The notice about the training was not sent: {said}")

    def _by_smtp(self, server, title, text):
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self.sender, self.to, title
        message.set_content(f"{title}: {text}")
        safe = {"context": ssl.create_default_context()}  # smtplib's own does not look at the certificate
        connect, options = (smtplib.SMTP_SSL, safe) if server.scheme == "smtps" else (smtplib.SMTP, {})
        with connect(server.hostname, server.port or 0, timeout=20, **options) as smtp:
            smtp.ehlo()
            if smtp.has_extn("starttls"):
                smtp.starttls(**safe)
            if server.username:
                smtp.login(unquote(server.username), unquote(server.password or ""))
            smtp.send_message(message)


class Checkpoint(Callback):
    """Keep the whole state of training under a URL, and go on from the newest when training starts anew.

    Training that was killed and started again ends with the weights and history of one that was not, to the bit (with
    DataLoader workers: but for their augmentation). A checkpoint is one object, there whole or not at all.
    every: "epoch", a number of steps (and every epoch), or "end". keep: so many of the newest stay. best: a column of
    the history; the model of the epoch in which it was best stays under {url}/best, for experiment.load_model.
    """

    order = 50  # after those that change the history, before those that end training

    def __init__(self, url, every="epoch", keep=2, best=None):
        if every not in ("epoch", "end") and not isinstance(every, int):
            raise ValueError(f'every is "epoch", "end" or a number of steps, not {every!r}')
        self.url, self.every, self.keep, self.best = str(url).rstrip("/"), every, keep, best

    def before_fit(self, loop):
        for name in reversed(self._names()):
            try:
                state = unpack(experiment.read(f"{self.url}/{name}"))
            except safetensors.SafetensorError:  # cut off where a write is not atomic: take the one before
                continue
            before = loop.steps
            loop.load_state_dict(state)
            loop.bar.update(loop.steps - before)
            break

    def after_step(self, loop):
        within = loop.batch < len(loop.train_loader) and loop.steps < loop.last_step  # or else after_epoch does it
        if isinstance(self.every, int) and within and loop.stepped and loop.steps % self.every < loop.accumulate:
            self._save(loop)  # at the first step of the optimizer from there: no gradients wait

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
        whole = all(weight.isfinite().all() for weight in loop.model.parameters())  # there is no going on from NaN
        if whole and loop.accelerator.is_main_process:
            experiment.write(f"{self.url}/step_{loop.steps:09d}_{loop.batch:09d}.safetensors", pack(state))
            for name in self._names()[:-self.keep]:
                experiment.remove(f"{self.url}/{name}")

    def _names(self):
        return [name for name in experiment.files(self.url) if re.fullmatch(r"step_\d+_\d+\.safetensors", name)]


def pack(state):
    """Nested dicts, lists, tuples, arrays, tensors and plain values as one safetensors file: no pickle in a bucket."""
    tensors = {}

    def plain(value):
        if isinstance(value, np.ndarray):
            return {"array": plain(torch.from_numpy(value))}
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.detach()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        return [plain(item) for item in value] if isinstance(value, list) else value

    tree = json.dumps(plain(state))  # fills tensors
    return experiment.packed(tensors, {"state": tree})


def unpack(data):
    """What `pack` packed, its tensors on the CPU."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])  # where safetensors keeps its metadata

    def nested(value):
        if isinstance(value, list):
            return [nested(item) for item in value]
        if not isinstance(value, dict):
            return value
        [(kind, item)] = value.items()
        if kind == "tensor":
            return tensors[item]
        if kind == "array":
            return nested(item).numpy()
        return tuple(map(nested, item)) if kind == "tuple" else {nested(key): nested(entry) for key, entry in item}

    return nested(json.loads(header["__metadata__"]["state"]))

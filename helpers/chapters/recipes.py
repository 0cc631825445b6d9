"""Callbacks for now and then: a dry run, what gradients look like, when to stop or warn, TensorBoard, notices."""

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
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import numpy as np
import torch
from botocore.exceptions import BotoCoreError, ClientError

from helpers import storage
from helpers.training import Callback, CancelFit


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
        from helpers.chapters.evaluation import PredictedClasses  # imports torchmetrics, which takes long: only where it is used

        loop.add_metrics({"predicted_classes": PredictedClasses()})

    def after_epoch(self, loop):
        if loop.history[-1].get("val_predicted_classes") == 1:
            warnings.warn(f"Epoch {loop.epoch}: the model predicts the same class for every validation sample.")


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
            storage.write(f"{self.url}/{path.name}", path.read_bytes())


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

"""The training loop: a page of code; all that is not the loop itself is a callback."""

import time

import torch
from accelerate import Accelerator
from torchmetrics import MetricCollection

from helpers.storage import progress

REFRESH = 0.25  # seconds between two looks at the loss: each look waits for the device, so not every step


class CancelFit(Exception):
    """Raised by a callback to end training in good order."""


class Callback:
    """Methods named after the moment (before_fit, before_epoch, after_step, after_epoch, after_fit) get the loop.

    Callbacks run by `order`, smallest first, and may use `loop.history`, `loop.epoch`, `loop.step_loss`, `loop.bar`.
    """

    order = 0


class TrainLoop:
    """Trains a model on its loader, with a progress bar, validation after every epoch, and callbacks.

    Batches are (inputs, targets); the model maps inputs to outputs and criterion(outputs, targets) is a scalar.
    scheduler: a torch scheduler, stepped after every batch. metrics: {name: torchmetrics.Metric}, of `evaluate`.
    The device, several processes and mixed precision are accelerate's (its environment variables apply).
    """

    def __init__(self, model, train_loader=None, val_loader=None, *, optimizer=None, criterion=None, scheduler=None,
                 metrics=None):
        self.accelerator = Accelerator()
        self.model, self.train_loader, self.val_loader, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, train_loader, val_loader, optimizer, scheduler)
        self.criterion = criterion
        self.metrics = MetricCollection(metrics or {}).to(self.accelerator.device)
        self.history = []  # a dict per epoch: epoch, train_loss, val_loss, val_{metric}, …
        self.callbacks = []
        self._prepared = {}  # the loaders of `evaluate` and `predict`

    def fit(self, num_epochs, callbacks=()):
        """Train for that many epochs more; returns the history. A callback that raises CancelFit ends it early."""
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        last = len(self.history) + num_epochs
        with progress(num_epochs * len(self.train_loader), "training", "batch") as self.bar:
            try:
                self._call("before_fit")
                while len(self.history) < last:
                    self.epoch = len(self.history) + 1
                    self.bar.set_description(f"epoch {self.epoch}/{last}", refresh=False)
                    self._call("before_epoch")
                    self.history.append({"epoch": self.epoch, **self._train_epoch()})
                    if self.val_loader is not None:
                        values = self.evaluate(self.val_loader)
                        self.history[-1] |= {f"val_{name}": value for name, value in values.items()}
                    self._call("after_epoch")
            except CancelFit:
                pass
            self._call("after_fit")
        return self.history

    def step(self, batch):
        """One training step on a batch that is on the device; returns its loss, still on the device."""
        self.model.train()
        with self.accelerator.accumulate(self.model):
            inputs, targets = batch
            loss = self.criterion(self.model(inputs), targets)
            self.accelerator.backward(loss)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def _train_epoch(self):
        total, seen, start, looked = torch.zeros((), device=self.accelerator.device), 0, time.perf_counter(), 0.0
        for batch in self.train_loader:
            self.step_loss = self.step(batch)
            total += self.step_loss * len(batch[1])
            seen += len(batch[1])
            if (now := time.perf_counter()) - looked > REFRESH:
                looked = now
                rate = seen / (now - start)
                self.bar.set_postfix_str(f"loss {total.item() / seen:.3f}, {rate:,.0f} samples/s", refresh=False)
            self.bar.update()
            self._call("after_step")
        loss, seconds = total.item() / max(seen, 1), time.perf_counter() - start
        return {"train_loss": loss, "train_samples_per_second": seen * self.accelerator.num_processes / seconds}

    @torch.inference_mode()
    def evaluate(self, loader):
        """{"loss": …, metric: …} over a loader, every sample counted once."""
        self.metrics.reset()
        total, seen = torch.zeros((), device=self.accelerator.device), 0
        for outputs, targets in self._outputs(loader):
            if self.criterion is not None:
                total += self.criterion(outputs, targets) * len(targets)
            self.metrics.update(outputs, targets)
            seen += len(targets)
        loss = {"loss": total.item() / max(seen, 1)} if self.criterion is not None else {}
        return loss | {name: value.item() for name, value in self.metrics.compute().items()}

    @torch.inference_mode()
    def predict(self, loader):
        """The model's outputs and the targets over a loader, in its order, on the CPU: (N, …), (N, …)."""
        outputs, targets = zip(*((outputs.cpu(), targets.cpu()) for outputs, targets in self._outputs(loader)))
        return torch.cat(outputs), torch.cat(targets)

    def _outputs(self, loader):
        self.model.eval()
        if id(loader) not in self._prepared:  # once: every time would start the loader's workers anew
            self._prepared[id(loader)] = loader, self.accelerator.prepare(loader)
        for inputs, targets in self._prepared[id(loader)][1]:
            yield self.accelerator.gather_for_metrics((self.model(inputs), targets))

    def _call(self, moment):
        for callback in self.callbacks:
            if method := getattr(callback, moment, None):
                method(self)


class EarlyStopping(Callback):
    """End training when a number in the history did not get better for `patience` epochs; a loss gets smaller."""

    order = 100  # after those that keep what the epoch brought

    def __init__(self, monitor="val_loss", patience=3):
        self.monitor, self.patience = monitor, patience

    def after_epoch(self, loop):
        values = [row[self.monitor] for row in loop.history]
        best = values.index(min(values) if "loss" in self.monitor else max(values))
        if len(values) - 1 - best >= self.patience:
            raise CancelFit

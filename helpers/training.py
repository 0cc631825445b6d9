"""The training loop: short enough to read in one sitting; all that is not the loop itself is a callback."""

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import find_batch_size, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from helpers import experiment
from helpers.storage import progress

REFRESH = 0.25  # seconds between two looks at the loss: each look waits for the device, so not every step


class CancelFit(Exception):
    """Raised by a callback to end training in good order."""


class Callback:
    """Methods named after the moment (before_fit, before_epoch, after_backward, after_step, after_epoch, after_fit).

    Each gets the loop. Callbacks run by `order`, smallest first, and may use `loop.history`, `loop.epoch`,
    `loop.steps` (done in all), `loop.step_loss`, `loop.bar`. after_backward is where gradients can be seen and changed.
    """

    order = 0


class _Task(nn.Module):
    """The model with its criterion, as one module: autocast and DDP then cover whatever the model does in a step."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, batch, training):
        """(loss or losses, outputs, targets); what there is none of is None."""
        if hasattr(self.model, "get_loss"):
            loss = self.model.get_loss(batch, self.criterion)
            return (loss, None, None) if training else (loss, *self.model.get_predictions(batch))
        if isinstance(batch, Mapping):
            outputs, targets = self.model(**batch), batch.get("labels")
        else:
            outputs, targets = self.model(batch[0]), batch[1]
        loss = getattr(outputs, "loss", None)
        outputs = getattr(outputs, "logits", outputs)
        return loss if self.criterion is None else self.criterion(outputs, targets), outputs, targets


class TrainLoop:
    """Trains a model on its loader, with a progress bar, validation after every epoch, and callbacks.

    model: any nn.Module. Batches are (inputs, targets), with criterion(model(inputs), targets) the loss; or a dict of
        the model's arguments, where a model that returns its loss, as those of transformers do, needs no criterion.
        For anything else the model has `get_loss(batch, criterion)` and `get_predictions(batch)` -> (outputs, targets).
    optimizer: one, or a list; get_loss then yields a loss for each, computed after the step of the one before, and
        each loss changes the weights of its own optimizer only (in one process; DDP takes one optimizer).
    scheduler: a torch scheduler, stepped after every step of the optimizer.
    metrics: {name: torchmetrics.Metric} or a MetricCollection, updated with (outputs, targets) in `evaluate`.
    accumulate: batches whose gradients are averaged for one step of the optimizer.
    options: of accelerate's Accelerator, such as mixed_precision="bf16". The device and several processes are its too.
    """

    def __init__(self, model, train_loader=None, val_loader=None, test_loader=None, *, optimizer=None, criterion=None,
                 scheduler=None, metrics=None, accumulate=1, **options):
        AcceleratorState._reset_state()  # each loop has its own precision
        options.setdefault("cpu", not torch.accelerator.is_available())  # several processes on CPUs need it said
        self.accelerator = Accelerator(**options)
        self.model, self.criterion, self.accumulate = model, criterion, accumulate
        self.train_loader, self.val_loader = self._placed(train_loader), self._placed(val_loader)
        self.test_loader = self._placed(test_loader)
        optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer] * (optimizer is not None)
        task = _Task(model, criterion)
        self.task, self.scheduler, *self.optimizers = self.accelerator.prepare(task, scheduler, *optimizers)
        self.metrics = MetricCollection(metrics or {}, compute_groups=False).to(self.accelerator.device)
        for metric in self.metrics.modules():
            metric.distributed_available_fn = lambda: False  # each gets the outputs of all processes as it is
        self.history = []  # a dict per epoch: epoch, train_loss, val_loss, val_{metric}, …
        self.steps = self.batch = 0  # steps done in all, and batches of the epoch under way
        self.callbacks = []

    def _placed(self, loader):
        return loader if loader is None or self.accelerator.num_processes == 1 else self.accelerator.prepare(loader)

    def fit(self, num_epochs=None, callbacks=(), num_steps=None):
        """Train for so many epochs, or steps, more; returns the history. A callback's CancelFit ends it early."""
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.last_step = self.steps + num_steps if num_steps else float("inf")
        last_epoch = len(self.history) + num_epochs if num_epochs else float("inf")
        total = num_steps or num_epochs * len(self.train_loader)
        with progress(total, "training", "batch") as self.bar:
            try:
                self._call("before_fit")
                while len(self.history) < last_epoch and self.steps < self.last_step:
                    self.epoch = len(self.history) + 1
                    self.bar.set_description(f"epoch {self.epoch}" + f"/{last_epoch}" * bool(num_epochs), refresh=False)
                    self._call("before_epoch")
                    row = {"epoch": self.epoch, **self._train_epoch()}
                    if self.val_loader is not None:
                        row |= {f"val_{name}": value for name, value in self.evaluate(self.val_loader).items()}
                    self.history.append(row)
                    self.batch = 0
                    self._call("after_epoch")
            except CancelFit:
                pass
            self._call("after_fit")
        return self.history

    def step(self, batch, size=1, last=True):
        """One training step on a batch: returns its loss, on the device. Can be called from a loop of one's own.

        With gradients accumulated over `size` batches, the optimizer's step comes with the `last` of them.
        """
        self.task.train()
        batch, total = send_to_device(batch, self.accelerator.device), 0
        with nullcontext() if last else self.accelerator.no_sync(self.task):
            losses, _, _ = self.task(batch, training=True)
            losses = iter(losses if isinstance(losses, (Iterator, tuple, list)) else [losses])
            for optimizer in self.optimizers:
                with self.accelerator.autocast():
                    loss = next(losses)
                only = {}
                if len(self.optimizers) > 1:
                    only = {"inputs": [weight for group in optimizer.param_groups for weight in group["params"]]}
                self.accelerator.backward(loss / size, **only)
                total += loss.detach()
                if last:
                    self._call("after_backward")
                    optimizer.step()
                    optimizer.zero_grad()
        if last and self.scheduler is not None:
            self.scheduler.step()
        return total

    def _train_epoch(self):
        start, looked, count = time.perf_counter(), 0.0, len(self.train_loader)
        batches, before = self._batches(), self.seen
        for batch in batches:
            left = count - self.batch // self.accumulate * self.accumulate  # in this group of batches, and after it
            self.batch += 1
            last = self.batch % self.accumulate == 0 or self.batch == count
            self.step_loss = self.step(batch, min(left, self.accumulate), last)
            size = find_batch_size(batch)
            self.total += self.step_loss * size
            self.seen += size
            self.steps += 1
            if (now := time.perf_counter()) - looked > REFRESH:
                looked, rate = now, (self.seen - before) / (now - start)
                loss = self.total.item() / self.seen
                self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} samples/s", refresh=False)
            self.bar.update()
            self._call("after_step")
            if self.steps >= self.last_step:
                break
        total, seen = self.accelerator.reduce((self.total, torch.tensor(self.seen, device=self.accelerator.device)))
        rate = (self.seen - before) * self.accelerator.num_processes / (time.perf_counter() - start)
        return {"train_loss": total.item() / max(seen.item(), 1), "train_samples_per_second": rate}

    def _batches(self):
        """The batches of this epoch that are still to be done; remembers what the epoch's order was drawn from."""
        loader = self.train_loader
        if not self.batch:
            self.epoch_random, self.seen = self._random(), 0
            self.total = torch.zeros((), device=self.accelerator.device)
            return iter(loader)
        now = self._random()
        self._set_random(self.epoch_random)  # draw the same order once more, then go on from where it was left
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # as a loader does when it starts
        order = iter(loader.batch_sampler)
        for _ in range(self.batch):
            next(order)
        rest = DataLoader(loader.dataset, batch_sampler=order,
                          num_workers=loader.num_workers, collate_fn=loader.collate_fn, generator=loader.generator,
                          worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context)
        batches = iter(rest)
        self._set_random(now)
        return batches

    @torch.inference_mode()
    def evaluate(self, loader):
        """{"loss": …, metric: …} over a loader, every sample counted once, in several processes too."""
        self.metrics.reset()
        total, seen = torch.zeros((), device=self.accelerator.device), 0
        for loss, outputs, targets in self._outputs(loader):
            if loss is not None:
                total += loss * find_batch_size(outputs)
            seen += find_batch_size(outputs)
            self.metrics.update(outputs, targets)
        values = {name: value.tolist() for name, value in self.metrics.compute().items()}
        return ({} if loss is None else {"loss": total.item() / seen}) | values

    @torch.inference_mode()
    def predict(self, loader):
        """The model's outputs and the targets over a loader, in its order, on the CPU: (N, …), (N, …)."""
        outputs, targets = zip(*((outputs.cpu(), targets.cpu()) for _, outputs, targets in self._outputs(loader)))
        return torch.cat(outputs), torch.cat(targets)

    def _outputs(self, loader):
        """(loss, outputs, targets) of each batch, of all processes together."""
        self.task.eval()
        if loader not in (self.train_loader, self.val_loader, self.test_loader):
            loader = self._placed(loader)
        for batch in loader:
            loss, *outputs = self.task(send_to_device(batch, self.accelerator.device), training=False)
            if self.accelerator.num_processes > 1:
                outputs = self.accelerator.gather_for_metrics(outputs)  # without what was added to make it even
                if self.criterion is not None:
                    loss = self.criterion(*outputs)
                elif loss is not None:
                    loss = self.accelerator.reduce(loss, "mean")
            yield loss, *outputs

    def _call(self, moment):
        for callback in self.callbacks:
            if method := getattr(callback, moment, None):
                method(self)

    # What makes training go on exactly where it was: see Checkpoint.

    _PLACE = ("history", "steps", "batch", "total", "seen", "epoch_random")

    def state_dict(self):
        """All that the rest of the training depends on: weights, optimizers, random states, place."""
        scaler = self.accelerator.scaler
        return {"model": self.model.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers],
                "scheduler": self.scheduler and self.scheduler.state_dict(), "scaler": scaler and scaler.state_dict(),
                "random": self._random(), **{name: getattr(self, name) for name in self._PLACE}}

    def load_state_dict(self, state):
        """Take up what `state_dict` gave, in a loop made in the same way."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for part, saved in ((self.scheduler, state["scheduler"]), (self.accelerator.scaler, state["scaler"])):
            if saved:
                part.load_state_dict(saved)
        for name in self._PLACE:
            setattr(self, name, state[name])
        self.total = self.total.to(self.accelerator.device)
        self._set_random(state["random"])

    def _generators(self):
        """The random generators of the loaders, each once: of the workers' seeds, and of the order."""
        owners = [owner for loader in (self.train_loader, self.val_loader) if loader is not None
                  for owner in (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))]
        return list({id(owner.generator): owner.generator for owner in owners
                     if getattr(owner, "generator", None) is not None}.values())

    def _random(self):
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "loaders": [generator.get_state() for generator in self._generators()]}

    def _set_random(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        for generator, saved in zip(self._generators(), state["loaders"], strict=True):
            generator.set_state(saved)


class EarlyStopping(Callback):
    """End training when a number in the history did not get better for `patience` epochs (see smaller_is_better)."""

    order = 100  # after those that keep what the epoch brought

    def __init__(self, monitor="val_loss", patience=3):
        self.monitor, self.patience = monitor, patience

    def after_epoch(self, loop):
        values = [row[self.monitor] for row in loop.history]
        best = values.index((min if experiment.smaller_is_better(self.monitor) else max)(values))
        if len(values) - 1 - best >= self.patience:
            raise CancelFit


class Checkpoint(Callback):
    """Keep the whole state of training under a URL, and go on from the newest when training starts anew.

    Training that was killed and started again ends with the weights and history of one that was not, to the bit (with
    DataLoader workers: but for their augmentation). A checkpoint is one object, there whole or not at all.
    every_steps: also within epochs. keep: so many of the newest stay.
    """

    order = 50  # after those that change the history, before those that end training

    def __init__(self, url, every_steps=None, keep=2):
        self.url, self.every_steps, self.keep = url, every_steps, keep

    def before_fit(self, loop):
        for name in reversed(self._names()):
            try:
                state = unpack(experiment.read(f"{self.url}/{name}"))
            except safetensors.SafetensorError:  # cut off where a write is not atomic: take the one before
                continue
            loop.load_state_dict(state)
            loop.bar.update(loop.steps)
            break

    def after_step(self, loop):
        whole_group = loop.batch % loop.accumulate == 0  # gradients that wait for a step are not kept
        if self.every_steps and loop.steps % self.every_steps == 0 and whole_group:
            self._save(loop)

    def after_epoch(self, loop):
        self._save(loop)

    def _save(self, loop):
        if loop.accelerator.is_main_process:
            state = loop.state_dict()
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

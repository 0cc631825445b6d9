"""The training loop, short enough to read in one sitting; everything else is a callback."""

import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from itertools import zip_longest

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from helpers.storage import progress

REFRESH = 0.25  # seconds between readings of the loss: each waits for the device, so not at every step


class CancelFit(Exception):
    """Raised by a callback to end training early, without an error."""


MOMENTS = "before_fit", "before_epoch", "after_backward", "after_step", "after_epoch", "after_fit", "after_error"
PLACE = "history", "steps", "batch", "total", "seen", "epoch_random"  # the attributes that describe progress


class Callback:
    """A class with methods named after the moments of training (MOMENTS), each called with the loop, by ascending `order`.

    They may read `loop.history`, `loop.epoch`, `loop.steps` (batches so far), `loop.stepped` (whether the optimizer
    stepped at this batch), `loop.step_loss` (on the device) and `loop.mean_loss` (the epoch's, when last read), and in
    after_backward change the gradients of `loop.weights`. after_fit also runs after CancelFit; after_error after any
    other exception. A callback's `state_dict` and `load_state_dict`, if it has them, make it part of the checkpoints.
    """

    order = 0


class _Task(nn.Module):
    """The model and its criterion as one module, so that autocast and DDP cover everything a step computes."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, batch, training):
        """(loss or losses, outputs, targets, and anything else the model predicts); each may be None."""
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
    """Train a model on its loader, with a progress bar, validation after every epoch, and callbacks.

    model: any nn.Module. Batches are (inputs, targets), with criterion(model(inputs), targets) the loss; or a dict of
        the model's arguments, where one that returns its loss, as those of transformers do, needs no criterion. For
        anything else the model has `get_loss(batch, criterion)` and `get_predictions(batch)` -> (outputs, targets),
        each a tensor or a list with one item per sample, optionally followed by a third for `predict`.
    optimizer: one, or a list; get_loss then yields one loss per optimizer, each computed after the previous
        optimizer's step, and each loss changes only its own optimizer's weights.
    test_loader: evaluated at the end of `fit`, as test_loss, test_{metric}, … in the last row of the history.
    scheduler: a torch scheduler, stepped after every optimizer step (or use callbacks.LearningRate).
    metrics: {name: torchmetrics.Metric} or a MetricCollection, updated with (outputs, targets) in `evaluate`.
    accumulate: the number of batches whose gradients are averaged for one optimizer step.
    options: of accelerate's Accelerator, which finds the device and the processes, such as mixed_precision="bf16".
    """

    def __init__(
        self,
        model,
        train_loader=None,
        val_loader=None,
        test_loader=None,
        *,
        optimizer=None,
        criterion=None,
        scheduler=None,
        metrics=None,
        accumulate=1,
        **options,
    ):
        AcceleratorState._reset_state()  # each loop has its own precision
        options.setdefault("cpu", not torch.accelerator.is_available())  # several CPU processes have to ask for it
        self.accelerator = Accelerator(**options)
        self.model, self.criterion, self.scheduler, self.accumulate = model, criterion, scheduler, accumulate
        several = isinstance(optimizer, (list, tuple))
        self.optimizers = list(optimizer) if several else [optimizer] if optimizer else []
        # Optimizers are not prepared by accelerate: its step costs 0.1 ms, since it looks for a package on the disk.
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)  # of losses, with fp16 only
        self.own_task = _Task(model, criterion)  # without DDP, for evaluation, where shares are unequal
        self.task = self.accelerator.prepare(self.own_task)
        self.train_loader, self.val_loader = self._shard(train_loader), self._shard(val_loader, even=False)
        self.test_loader = self._shard(test_loader, even=False)
        self.random = _random_sources(self.accelerator.device, train_loader, val_loader)
        self.metrics = None
        if metrics:
            self.add_metrics(metrics)
        self.history = []  # a dict per epoch: epoch, train_loss, val_loss, val_{metric}, …
        self.steps = self.batch = 0  # batches so far, and those of the unfinished epoch
        self.callbacks, self.frozen = [], []  # frozen: modules that stay in evaluation mode, such as a batch norm

    def _shard(self, loader, even=True):
        """A loader over this process's share of the batches, in an order common to all processes.

        For training (`even`) all get as many batches; for evaluation every sample is in one share. An IterableDataset
        shards itself for training; what cannot be divided is evaluated whole by every process.
        """
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        if loader is None or processes == 1 or isinstance(loader.dataset, IterableDataset):
            return loader
        if loader.batch_sampler is None or not even and len(loader) < processes:
            return loader
        if isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is None:
            [seed] = broadcast_object_list([torch.initial_seed()])
            loader.sampler.generator = torch.Generator().manual_seed(seed)
        share = BatchSamplerShard(loader.batch_sampler, processes, index, even_batches=even)
        share.drop_last &= even  # what it drops is the last batch of all processes
        loader = _replace_order(loader, share)
        loader.shared = True
        return loader

    def add_metrics(self, metrics):
        """Compute these in `evaluate` as well."""
        from torchmetrics import MetricCollection  # takes longer to import than PyTorch, and not every loop needs it

        self.metrics = self.metrics or MetricCollection({}, compute_groups=False)
        self.metrics.add_metrics(metrics)
        for metric in self.metrics.to(self.accelerator.device).modules():
            metric.distributed_available_fn = lambda: self.shared  # whether `compute` adds up all processes

    def fit(self, num_epochs=None, callbacks=(), num_steps=None):
        """Train for this many more epochs or steps and return the history. A callback's CancelFit ends it early."""
        if self.train_loader is None or not self.optimizers or not (num_epochs or num_steps):
            raise ValueError("Training takes a train_loader and an optimizer, and fit a num_epochs or num_steps.")
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.num_epochs, self.num_steps, begun = num_epochs, num_steps, self.steps
        self.last_step = self.steps + num_steps if num_steps else math.inf
        last_epoch = len(self.history) + num_epochs if num_epochs else math.inf
        try:
            with suppress(CancelFit):
                self._call("before_fit")  # may take up a checkpoint, or make training shorter
                total, done = None if self.total_steps == math.inf else self.total_steps, self.steps - begun
                with progress(total, "training", "batch", initial=done) as self.bar:
                    while len(self.history) < last_epoch and self.steps < self.last_step:
                        self.epoch = len(self.history) + 1
                        of = f"/{last_epoch}" if num_epochs else ""
                        self.bar.set_description(f"epoch {self.epoch}{of}", refresh=False)
                        self._call("before_epoch")
                        self.history.append(self._train_epoch() | self._measure("val", self.val_loader))
                        self.batch = 0
                        self._call("after_epoch")
            if self.history:
                self.history[-1] |= self._measure("test", self.test_loader)
        except BaseException:  # KeyboardInterrupt, too
            self._call("after_error")
            raise
        self._call("after_fit")
        return self.history

    def _measure(self, name, loader):
        return {} if loader is None else {f"{name}_{key}": value for key, value in self.evaluate(loader).items()}

    @property
    def epoch_batches(self):
        """Batches per epoch and process; infinite for a stream without a length."""
        try:
            return len(self.train_loader)
        except TypeError:
            return math.inf

    @property
    def total_steps(self):
        """Batches in the whole fit, per process."""
        return self.num_steps or self.num_epochs * self.epoch_batches

    @property
    def weights(self):
        """The weights of the optimizer (of several, the one whose turn it is)."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def step(self, batch, size=1, last=True):
        """Train on a batch, in a loop of your own too; return its loss, on the device.

        With gradients accumulated over `size` batches, the optimizer steps at the `last` of them.
        """
        if not self.model.training:
            self.task.train()
            for module in self.frozen:
                module.training = False
        batch, total, several = send_to_device(batch, self.accelerator.device), None, len(self.optimizers) > 1
        with nullcontext() if last and not several else getattr(self.task, "no_sync", nullcontext)():  # only DDP has it
            losses, *_ = self.task(batch, training=True)
            precision = self.accelerator.autocast if isinstance(losses, Iterator) else nullcontext  # it computes later
            losses = iter(losses if isinstance(losses, (Iterator, tuple, list)) else [losses])
            self.stepped = last
            for self.optimizer in self.optimizers:
                with precision():
                    loss = next(losses)
                total = loss.detach() if total is None else total + loss.detach()
                self.scaler.scale(loss / size if size > 1 else loss).backward(inputs=self.weights if several else None)
                if last:
                    self._update(several)
        if self.stepped and self.scheduler is not None:
            self.scheduler.step()
        return total

    def _update(self, several):
        """One optimizer step, with the unscaled gradients averaged across processes."""
        if several and self.accelerator.num_processes > 1:  # DDP averages only after one backward for all weights
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad.contiguous(), "mean")
        self.scaler.unscale_(self.optimizer)
        self._call("after_backward")
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)  # not when a gradient overflows fp16, after which the scale is smaller
        self.scaler.update()
        self.stepped &= self.scaler.get_scale() >= scale
        self.optimizer.zero_grad()

    def _train_epoch(self):
        start, read, batches, before = time.perf_counter(), 0.0, self._batches(), self.seen
        count = min(self.epoch_batches, self.batch + self.last_step - self.steps)
        for batch in batches:
            left = count - self.batch // self.accumulate * self.accumulate  # batches from the start of this group
            self.batch += 1
            last = self.batch % self.accumulate == 0 or self.batch == count
            self.step_loss = self.step(batch, min(left, self.accumulate), last)
            size = _size(batch)
            self.total = self.total + self.step_loss * size  # on the device
            self.seen += size
            self.steps += 1
            if (now := time.perf_counter()) - read > REFRESH:
                read, rate = now, (self.seen - before) / (now - start)
                self.mean_loss = self.total.item() / self.seen
                self.bar.set_postfix_str(f"loss {self.mean_loss:.3f}, {rate:,.0f} samples/s", refresh=False)
            self.bar.update()
            self._call("after_step")
            if self.steps >= self.last_step:
                break
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # left by a stream's last batches, which had no step
        device = self.accelerator.device
        total, seen = self.accelerator.reduce((self.total.to(device), torch.tensor(self.seen, device=device)))
        rate = (self.seen - before) * self.accelerator.num_processes / (time.perf_counter() - start)
        self.mean_loss = total.item() / max(seen.item(), 1)
        return {"epoch": self.epoch, "train_loss": self.mean_loss, "train_samples_per_second": rate}

    def _batches(self):
        """The batches of this epoch that have not been trained on yet."""
        loader, now = self.train_loader, self._random_states()
        if not self.batch:
            self.epoch_random, self.seen, self.total = now, 0, torch.zeros(())
            return iter(loader)
        self._set_random_states(self.epoch_random)  # draw the same order as before and skip what is done
        if by_index := loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # as a DataLoader does at its start
        order = iter(loader.batch_sampler if by_index else loader)
        for _ in range(self.batch):
            next(order)
        batches = iter(_replace_order(loader, order)) if by_index else order
        self._set_random_states(now)
        return batches

    @torch.inference_mode()
    def evaluate(self, loader):
        """{"loss": …, metric: …} over a loader, every sample counted once; warns and returns {} if it has no batches."""
        if self.metrics:
            self.metrics.reset()
        total, seen = torch.zeros((), device=self.accelerator.device), 0
        for loss, outputs, targets, *_ in self._outputs(loader):
            size = len(outputs) if isinstance(outputs, list) else _size(outputs)
            total, seen = None if loss is None else total + loss * size, seen + size
            if self.metrics:
                self.metrics.update(outputs, targets)
        if not seen:
            warnings.warn("There is nothing to evaluate: the loader has no batches.")
            return {}
        values = {name: value.tolist() for name, value in self.metrics.compute().items()} if self.metrics else {}
        if total is None:
            return values
        if self.shared:
            total, seen = self.accelerator.reduce((total, torch.tensor(seen, device=total.device)))
        return {"loss": total.item() / int(seen), **values}

    @torch.inference_mode()
    def predict(self, loader):
        """The outputs, targets, and any third value of get_predictions, over a loader, in its order, on the CPU.

        Each (samples, …), or a list of samples where they are not tensors or differ in shape.
        """
        batches = [send_to_device(parts, "cpu") for _, *parts in self._outputs(loader)]
        if self.shared:  # the processes took batches in turns
            turns = zip_longest(*gather_object([batches]))
            batches = [batch for turn in turns for batch in turn if batch is not None]
        return tuple(_join(parts) for parts in zip(*batches)) or ([], [])

    def _outputs(self, loader):
        """(loss, outputs, targets) of each batch in this process's share."""
        if loader not in (self.train_loader, self.val_loader, self.test_loader):
            loader = self._shard(loader, even=False)
        self.shared = hasattr(loader, "shared")
        if self.accelerator.num_processes > 1:
            broadcast(list(self.model.buffers()))  # a batch norm's statistics, which DDP does not average
        if self.model.training:
            self.frozen = [module for module in self.task.modules() if not module.training]
        self.task.eval()
        for batch in loader:
            loss, *outputs = self.own_task(send_to_device(batch, self.accelerator.device), training=False)
            yield sum(loss) if isinstance(loss, (Iterator, tuple, list)) else loss, *outputs

    def _call(self, moment):
        for callback in self.callbacks:
            if method := getattr(callback, moment, None):
                method(self)

    def state_dict(self):
        """Everything the rest of training depends on, for exact resume. Every process must call it."""
        self.total = self.total.cpu()  # or others would load it onto this process's GPU; the next step moves it back
        own = {"random": self._random_states(), "place": {name: vars(self)[name] for name in PLACE}}
        return {"parts": [part.state_dict() for part in self._parts()], "processes": gather_object([own])}

    def load_state_dict(self, state):
        """Continue from what `state_dict` returned. Raises ValueError for other processes, optimizers or callbacks."""
        if (count := len(state["processes"])) != self.accelerator.num_processes:
            here = self.accelerator.num_processes
            way_out = "use as many, or another place for its checkpoints"
            raise ValueError(f"This training was begun with {count} processes and cannot go on with {here}: {way_out}.")
        for part, saved in zip(self._parts(), state["parts"], strict=True):
            part.load_state_dict(saved)
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # an error may have left gradients
        own = state["processes"][self.accelerator.process_index]
        vars(self).update(own["place"])
        self._set_random_states(own["random"])

    def _parts(self):
        parts = self.model, *self.optimizers, self.scheduler, self.accelerator.scaler, *self.callbacks
        return [part for part in parts if hasattr(part, "state_dict")]

    def _random_states(self):
        return {name: get() for name, (get, _) in self.random.items()}

    def _set_random_states(self, states):
        for name in states.keys() & self.random.keys():  # a GPU's is missing where training continues without one
            self.random[name][1](states[name])


def _random_sources(device, *loaders):
    """{name: (get state, set state)} for every source of randomness: Python, NumPy, PyTorch, the loaders."""
    sources = {
        "python": (random.getstate, random.setstate),
        "numpy": (np.random.get_state, np.random.set_state),
        "torch": (torch.get_rng_state, torch.set_rng_state),
    }
    if device.type != "cpu":
        module = torch.get_device_module(device)
        sources[device.type] = (module.get_rng_state, module.set_rng_state)
    generators = {}  # as an ordered set: loaders may share one
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None):
            generators[getattr(owner, "generator", None)] = None
    generators.pop(None, None)
    return sources | {f"loader {i}": (each.get_state, each.set_state) for i, each in enumerate(generators)}


def _size(batch):
    """How many samples a batch has: the length of its first tensor or list of texts, within dicts and tuples."""
    if isinstance(batch, Mapping):
        return _size(next(iter(batch.values())))
    inner = isinstance(batch, (tuple, list)) and isinstance(batch[0], (torch.Tensor, Mapping, tuple, list))
    return _size(batch[0]) if inner else len(batch)


def _join(parts):
    """The parts of all batches as one tensor, or as a list of samples."""
    if all(isinstance(part, torch.Tensor) for part in parts) and len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    return None if parts[0] is None else [sample for part in parts for sample in part]


def best_precision():
    """The best mixed_precision on this hardware: "bf16" where it multiplies natively in it, otherwise "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    cpu = torch.cpu.get_capabilities()
    return "bf16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "no"


def _replace_order(loader, batch_sampler):
    """A loader like this one, with its batches drawn by batch_sampler."""
    kept = "num_workers collate_fn pin_memory generator worker_init_fn multiprocessing_context persistent_workers"
    options = {name: getattr(loader, name) for name in kept.split()}
    return DataLoader(loader.dataset, batch_sampler=batch_sampler, **options)

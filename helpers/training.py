"""The training loop: short enough to read in one sitting; all that is not the loop itself is a callback."""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, find_batch_size, gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from helpers.storage import progress

REFRESH = 0.25  # seconds between two looks at the loss: each look waits for the device, so not every step


class CancelFit(Exception):
    """Raised by a callback to end training in good order."""


MOMENTS = ("before_fit", "before_epoch", "after_backward", "after_step", "after_epoch", "after_fit", "after_error")


class Callback:
    """Methods named after the moment (MOMENTS), each of which gets the loop. Those that ship are in callbacks.py.

    Callbacks run by `order`, smallest first, and may use `loop.history`, `loop.epoch`, `loop.steps` (done in all),
    `loop.stepped` (whether the optimizer did, too), `loop.step_loss` (on the device), `loop.mean_loss` (of the epoch, at
    the last look), `loop.bar`. after_backward is
    where the gradients of `loop.weights` can be seen and changed. after_fit comes after CancelFit too, after_error after
    any other exception. What `state_dict` gives, if there is one, goes into checkpoints and back to `load_state_dict`.
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
        each loss changes the weights of its own optimizer only.
    scheduler: a torch scheduler, stepped after every step of the optimizer (callbacks.LearningRate does without).
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
        several = isinstance(optimizer, (list, tuple))
        self.optimizers = list(optimizer) if several else [optimizer] * (optimizer is not None)
        # They are not prepared by accelerate: its own look for a package on the disk in every step, 0.1 ms for nothing.
        self.task, self.scheduler = self.accelerator.prepare(_Task(model, criterion), scheduler)
        loaders = train_loader, val_loader
        self.train_loader, self.val_loader = self._sharded(train_loader), self._placed(val_loader)
        self.test_loader = self._placed(test_loader)
        owners = [owner for loader in loaders if loader is not None
                  for owner in (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))]
        self.generators = list({id(owner.generator): owner.generator for owner in owners  # of orders and workers' seeds
                                if getattr(owner, "generator", None) is not None}.values())
        self.metrics = None
        if metrics:
            self.add_metrics(metrics)
        self.history = []  # a dict per epoch: epoch, train_loss, val_loss, val_{metric}, …
        self.steps = self.batch = 0  # steps done in all, and batches of the epoch under way
        self.callbacks = []

    def _placed(self, loader):
        return loader if loader is None or self.accelerator.num_processes == 1 else self.accelerator.prepare(loader)

    def _sharded(self, loader):
        """The loader of this process's share of the batches, in the order that all processes draw alike.

        An IterableDataset sees to its share itself, and has to give all processes as many batches.
        """
        if loader is None or self.accelerator.num_processes == 1 or isinstance(loader.dataset, IterableDataset):
            return loader
        if isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is None:
            [seed] = broadcast_object_list([torch.initial_seed()])
            loader.sampler.generator = torch.Generator().manual_seed(seed)
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        return _over(loader, BatchSamplerShard(loader.batch_sampler, processes, index),
                     persistent_workers=loader.persistent_workers)

    def add_metrics(self, metrics):
        """Have `evaluate` measure these, too."""
        from torchmetrics import MetricCollection  # takes longer to import than PyTorch: only where it is used

        self.metrics = self.metrics or MetricCollection({}, compute_groups=False)
        self.metrics.add_metrics(metrics)
        for metric in self.metrics.to(self.accelerator.device).modules():
            metric.distributed_available_fn = lambda: False  # each gets the outputs of all processes as it is

    def fit(self, num_epochs=None, callbacks=(), num_steps=None):
        """Train for so many epochs, or steps, more; returns the history. A callback's CancelFit ends it early."""
        if self.train_loader is None or not self.optimizers or not (num_epochs or num_steps):
            raise ValueError("Training takes a train_loader and an optimizer, and fit a num_epochs or num_steps.")
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.num_epochs, self.num_steps = num_epochs, num_steps
        self.last_step = self.steps + num_steps if num_steps else float("inf")
        last_epoch = len(self.history) + num_epochs if num_epochs else float("inf")
        with progress(self.total_steps, "training", "batch") as self.bar:
            try:
                self._call("before_fit")
                self.bar.total = self.total_steps  # a callback may have shortened it
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
            except BaseException:  # Ctrl-C, too
                self._call("after_error")
                raise
            self._call("after_fit")
        return self.history

    @property
    def total_steps(self):
        """Batches of the whole fit, on each process."""
        return self.num_steps or self.num_epochs * len(self.train_loader)

    @property
    def weights(self):
        """What the optimizer that steps now changes (one after the other, where there are several)."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def step(self, batch, size=1, last=True):
        """One training step on a batch: returns its loss, on the device. Can be called from a loop of one's own.

        With gradients accumulated over `size` batches, the optimizer's step comes with the `last` of them.
        """
        if not self.model.training:
            self.task.train()
        batch, total, several = send_to_device(batch, self.accelerator.device), None, len(self.optimizers) > 1
        with nullcontext() if last and not several else getattr(self.task, "no_sync", nullcontext)():  # DDP has it
            losses, _, _ = self.task(batch, training=True)
            precision = self.accelerator.autocast if isinstance(losses, Iterator) else nullcontext  # it computes later
            losses = iter(losses if isinstance(losses, (Iterator, tuple, list)) else [losses])
            for self.optimizer in self.optimizers:
                with precision():
                    loss = next(losses)
                total = loss.detach() if total is None else total + loss.detach()
                if size > 1:
                    loss = loss / size
                if self.accelerator.scaler:
                    loss = self.accelerator.scaler.scale(loss)
                loss.backward(inputs=self.weights if several else None)
                if last:
                    self._update(several)
        if last and self.scheduler is not None:
            self.scheduler.step()
        self.stepped = last
        return total

    def _update(self, several):
        """The optimizer's step, with the mean of the gradients of all processes, at their true scale."""
        scaler = self.accelerator.scaler
        if several and self.accelerator.num_processes > 1:  # DDP's own mean expects one backward for all weights
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad.contiguous(), "mean")
        if scaler:
            scaler.unscale_(self.optimizer)
        self._call("after_backward")
        if scaler:  # makes no step when a gradient is beyond fp16
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

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
                self.mean_loss = self.total.item() / self.seen
                self.bar.set_postfix_str(f"loss {self.mean_loss:.3f}, {rate:,.0f} samples/s", refresh=False)
            self.bar.update()
            self._call("after_step")
            if self.steps >= self.last_step:
                break
        total, seen = self.accelerator.reduce((self.total, torch.tensor(self.seen, device=self.accelerator.device)))
        rate = (self.seen - before) * self.accelerator.num_processes / (time.perf_counter() - start)
        self.mean_loss = total.item() / max(seen.item(), 1)
        return {"train_loss": self.mean_loss, "train_samples_per_second": rate}

    def _batches(self):
        """The batches of this epoch that are still to be done; remembers what the epoch's order was drawn from."""
        loader = self.train_loader
        if not self.batch:
            self.epoch_random, self.seen = self._random(), 0
            self.total = torch.zeros((), device=self.accelerator.device)
            return iter(loader)
        now = self._random()
        self._set_random(self.epoch_random)  # draw the same order once more, then go on from where it was left
        if iterable := isinstance(loader.dataset, IterableDataset):
            order = iter(loader)
        else:
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # as a loader does when it starts
            order = iter(loader.batch_sampler)
        for _ in range(self.batch):
            next(order)
        batches = order if iterable else iter(_over(loader, order))
        self._set_random(now)
        return batches

    @torch.inference_mode()
    def evaluate(self, loader):
        """{"loss": …, metric: …} over a loader, every sample counted once, in several processes too."""
        if self.metrics:
            self.metrics.reset()
        total, seen = torch.zeros((), device=self.accelerator.device), 0
        for loss, outputs, targets in self._outputs(loader):
            if loss is not None:
                total += loss * find_batch_size(outputs)
            seen += find_batch_size(outputs)
            if self.metrics:
                self.metrics.update(outputs, targets)
        values = {name: value.tolist() for name, value in self.metrics.compute().items()} if self.metrics else {}
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
            loss = sum(loss) if isinstance(loss, (Iterator, tuple, list)) else loss
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
        """All that the rest of the training depends on: weights, optimizers, callbacks, random states, place.

        Every process has to call it, for each has random states of its own.
        """
        scaler, place = self.accelerator.scaler, {name: getattr(self, name) for name in self._PLACE}
        mine = {"random": self._random(), "place": {**place, "total": self.total.cpu()}}
        return {"model": self.model.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers],
                "scheduler": self.scheduler and self.scheduler.state_dict(), "scaler": scaler and scaler.state_dict(),
                "callbacks": [callback.state_dict() for callback in self._with_state()],
                "processes": gather_object([mine])}

    def load_state_dict(self, state):
        """Take up what `state_dict` gave, in a loop made in the same way, with the same callbacks.

        Raises ValueError when it is of another number of processes: each goes on from its own place.
        """
        if (count := len(state["processes"])) != self.accelerator.num_processes:
            raise ValueError(f"This training was begun with {count} processes and cannot go on with "
                             f"{self.accelerator.num_processes}: use as many, or another place for its checkpoints.")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            optimizer.zero_grad()  # what an error has left
        for part, saved in ((self.scheduler, state["scheduler"]), (self.accelerator.scaler, state["scaler"]),
                            *zip(self._with_state(), state["callbacks"], strict=True)):
            if saved:
                part.load_state_dict(saved)
        mine = state["processes"][self.accelerator.process_index]
        vars(self).update(mine["place"])
        self.total = self.total.to(self.accelerator.device)
        self._set_random(mine["random"])

    def _with_state(self):
        return [callback for callback in self.callbacks if hasattr(callback, "state_dict")]

    def _random(self):
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "loaders": [generator.get_state() for generator in self.generators]}

    def _set_random(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        for generator, saved in zip(self.generators, state["loaders"], strict=True):
            generator.set_state(saved)


def best_precision():
    """What TrainLoop's mixed_precision should be here: "bf16" where the hardware multiplies in it, or "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    cpu = torch.cpu.get_capabilities()
    return "bf16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "no"


def _over(loader, batch_sampler, **options):
    """A loader like this one, over other batches."""
    return DataLoader(loader.dataset, batch_sampler=batch_sampler, num_workers=loader.num_workers,
                      collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, generator=loader.generator,
                      worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
                      **options)

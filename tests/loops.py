"""What the tests of training share: callbacks made of functions, a small model and its data, several processes."""

import multiprocessing
import os
import random

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from helpers.training import Callback, CancelFit, TrainLoop
from servers import free_port

LAST = 1000  # an order after all others


class Call(Callback):
    """Functions of the loop, by the moment at which they are called."""

    def __init__(self, order=0, **functions):
        self.order = order
        vars(self).update(functions)


def fail(loop):
    raise ZeroDivisionError("on purpose")


def cancel(loop):
    raise CancelFit


def at(step, action):
    return lambda loop: action(loop) if loop.steps == step else None


def script(name, values):
    """Puts these values into the history, epoch by epoch."""
    write = lambda loop: loop.history[-1].update({name: values[len(loop.history) - 1]})
    return Call(after_epoch=write, order=-50)


class Net(nn.Module):
    """Two layers with a batch norm and a dropout (`noise`), and one that is not trained."""

    def __init__(self, noise=True):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norm, self.drop = (nn.BatchNorm1d(4), nn.Dropout(0.2)) if noise else (nn.Identity(), nn.Identity())
        self.spare = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, inputs, labels=None):
        return self.head(self.drop(torch.tanh(self.norm(self.body(inputs)))))


class Pair(Net):
    """The same with two losses, for two optimizers."""

    def get_loss(self, batch, criterion):
        for _ in range(2):
            yield criterion(self(batch[0]), batch[1])

    def get_predictions(self, batch):
        return self(batch[0]), batch[1]


class Rows(Dataset):
    """Numbers with a trace of their class; `augmented`: a little different each time, from every random generator."""

    def __init__(self, seed=0, count=18, augmented=False):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(3, (count,), generator=generator)
        self.inputs = torch.randn(count, 5, generator=generator) + self.targets[:, None]
        self.augmented = augmented

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        noise = torch.randn(5) + random.random() + np.random.random() if self.augmented else 0
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class Stream(IterableDataset):
    """The same rows, but nobody knows beforehand how many."""

    def __iter__(self):
        return map(Rows().__getitem__, range(18))


def batches(seed=0, augmented=False, **options):
    """Four batches of 4, and one of 2."""
    return DataLoader(Rows(seed, augmented=augmented), 4, **options)


def make_loop(rates=(0.1,), val=True, kind=torch.optim.SGD, train=None, model=None, **options):
    """A loop over shuffled batches, always with the same weights and order; with two rates it has two optimizers."""
    set_seed(0)
    model = model or (Net() if len(rates) == 1 else Pair())
    parts = [model] if len(rates) == 1 else [model.body, model.head]
    optimizers = [kind(part.parameters(), lr=rate) for part, rate in zip(parts, rates)]
    if train is None:
        train = batches(shuffle=True, generator=torch.Generator().manual_seed(3))
    if val is True:
        val = batches(1, generator=torch.Generator())  # else it takes a number from the training's dropout
    options = {"optimizer": optimizers, "criterion": nn.CrossEntropyLoss(), **options}
    return TrainLoop(model, train, val, **options)


def same(one, other):
    """Whether two models have the same weights, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    """The history without what differs from run to run."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]


def on_two_processes(function, *arguments, **environment):
    """Call the function in two processes that know of each other, as torchrun starts them."""
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    multiprocessing.set_forkserver_preload(["torchmetrics.classification", "helpers.images", "helpers.callbacks"])
    torch.multiprocessing.start_processes(_start, (environment, function, arguments), 2, start_method="forkserver")


def _start(rank, environment, function, arguments):
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*arguments)

"""What the tests of training share: callbacks made of functions, a small model and its data, how runs are compared."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.training import Callback, CancelFit, TrainLoop

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
    """Two layers, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head, self.spare = nn.Linear(5, 4), nn.Dropout(0.2), nn.Linear(4, 3), nn.Linear(1, 1)

    def forward(self, inputs, labels=None):
        return self.head(self.drop(torch.tanh(self.body(inputs))))


class Pair(Net):
    """The same with two losses, for two optimizers."""

    def get_loss(self, batch, criterion):
        for _ in range(2):
            yield criterion(self(batch[0]), batch[1])

    def get_predictions(self, batch):
        return self(batch[0]), batch[1]


def batches(seed=0, **options):
    """Five batches of 4."""
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(20, 5, generator=generator), torch.randint(3, (20,), generator=generator))
    return DataLoader(data, 4, **options)


def make_loop(rates=(0.1,), val=True, kind=torch.optim.SGD, collate=None, **options):
    """A loop over shuffled batches, always with the same weights and order; with two rates it has two optimizers."""
    torch.manual_seed(0)
    model = Net() if len(rates) == 1 else Pair()
    parts = [model] if len(rates) == 1 else [model.body, model.head]
    optimizers = [kind(part.parameters(), lr=rate) for part, rate in zip(parts, rates)]
    train = batches(shuffle=True, generator=torch.Generator().manual_seed(3), collate_fn=collate)
    val = batches(1, collate_fn=collate) if val else None
    return TrainLoop(model, train, val, optimizer=optimizers, **{"criterion": nn.CrossEntropyLoss(), **options})


def same(one, other):
    """Whether two models have the same weights, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    """The history without what differs from run to run."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]

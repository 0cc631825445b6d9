"""Networks for images, and the one that was saved, ready to predict."""

from torch import nn

from helpers import experiment, storage


def small_cnn(num_classes, width=32):
    """Four blocks of convolution, batch norm, ReLU and pooling, then the mean over the plane: any image size from 16.

    (N, 3, H, W) float -> (N, num_classes) logits; 0.25 million weights.
    """
    def block(inputs, outputs):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)

    widths = [3, width, 2 * width, 4 * width, 4 * width]
    blocks = [layer for pair in zip(widths, widths[1:]) for layer in block(*pair)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1], num_classes)
    return nn.Sequential(*blocks, *head)


def resnet18(num_classes):
    """torchvision's, untrained."""
    from torchvision import models  # takes as long to import as PyTorch: only where it is used

    return models.resnet18(num_classes=num_classes)


ARCHITECTURES = {"small_cnn": small_cnn, "resnet18": resnet18}


def build(architecture, num_classes):
    """An untrained network by name. Raises ValueError for a name that is not in `ARCHITECTURES`."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](num_classes)


def load_model(url):
    """A saved network, ready to predict, and what was saved with it (architecture, classes, image_size, mean, std)."""
    try:
        weights, config = experiment.load_model(url)
    except storage.NotFound as error:
        raise storage.NotFound(f"{error} Train a model first, with notebook 02 (make run NOTEBOOKS=02).") from None
    model = build(config["architecture"], len(config["classes"]))
    model.load_state_dict(weights)
    return model.eval(), config

"""The networks over images and measurements. `layers` is fastnets.nn, or torch.nn for the twin."""

from torch import Tensor, nn
from torch.nn import functional as F


def cnn_rgb(layers) -> nn.Module:
    """[B, 3, 32, 32] -> scores [B, 10]."""
    return nn.Sequential(
        layers.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        layers.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        layers.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        layers.Linear(128, 10),
    )


class CnnGray(nn.Module):
    """[B, 1, 28, 28] -> log-probabilities [B, 10]."""

    def __init__(self, layers):
        super().__init__()
        self.conv1 = layers.Conv2d(1, 32, 3)
        self.conv2 = layers.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout2d(0.25)
        self.fc1 = layers.Linear(9216, 128)
        self.dropout2 = layers.Dropout(0.5)
        self.fc2 = layers.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(x.flatten(1))))
        return F.log_softmax(self.fc2(x), dim=1)


def cnn_deep(layers) -> nn.Module:
    """[B, 1, 28, 28] -> scores [B, 10]."""
    return nn.Sequential(
        layers.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        layers.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        layers.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        layers.Linear(576, 64),
        nn.ReLU(),
        layers.Linear(64, 10),
    )


def mlp(layers) -> nn.Module:
    """[B, 1, 28, 28] -> scores [B, 10]."""
    return nn.Sequential(nn.Flatten(), layers.Linear(784, 128), nn.ReLU(), layers.Linear(128, 10))


def perceptron(layers) -> nn.Module:
    """[B, 10] -> a probability [B, 1], through five sigmoid units."""
    return nn.Sequential(layers.Linear(10, 5), nn.Sigmoid(), layers.Linear(5, 1), nn.Sigmoid())

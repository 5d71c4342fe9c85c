"""The network of the app, its data, and how it is trained."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(torch.sigmoid(self.norm(self.conv(x))).flatten(1))
        return out


def load_data(partition: int, partitions: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x[partition::partitions][:4], torch.tensor(labels)[partition::partitions][:4]


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float) -> float:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    loss = F.cross_entropy(net((x - 0.5) / 0.5), y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss)

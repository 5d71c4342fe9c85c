"""The client of the app: a NumPyClient."""

import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, NDArrays, Scalar

from legacy.task import Net, load_data, train


class FlowerClient(NumPyClient):
    def __init__(self, partition: int, partitions: int, lr: float) -> None:
        self.net, self.lr = Net(), lr
        self.x, self.y = load_data(partition, partitions)

    def fit(
        self, parameters: NDArrays, config: dict[str, bool | bytes | float | int | str]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        state = zip(self.net.state_dict(), map(torch.tensor, parameters), strict=True)
        self.net.load_state_dict(dict(state))
        loss = train(self.net, self.x, self.y, self.lr)
        arrays = [value.numpy() for value in self.net.state_dict().values()]
        return arrays, len(self.y), {"train_loss": loss}


def client_fn(context: Context):  # type: ignore[no-untyped-def]
    node = context.node_config
    partition, partitions = int(node["partition-id"]), int(node["num-partitions"])
    return FlowerClient(partition, partitions, float(context.run_config["lr"])).to_client()


app = ClientApp(client_fn)

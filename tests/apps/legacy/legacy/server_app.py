"""The server of the app, as an app of the legacy kind has it: a server_fn."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from legacy.task import Net


def server_fn(context: Context) -> ServerAppComponents:
    torch.manual_seed(0)
    arrays = [value.numpy() for value in Net().state_dict().values()]
    strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=ndarrays_to_parameters(arrays))
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)

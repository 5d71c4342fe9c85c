"""The client of the app."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data, train

app = ClientApp()


@app.train()
def train_on_own_data(msg: Message, context: Context) -> Message:
    net = Net()
    arrays = msg.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    net.load_state_dict(arrays.to_torch_state_dict())
    node = context.node_config
    x, y = load_data(int(node["partition-id"]), int(node["num-partitions"]))
    loss = train(net, x, y, lr=float(context.run_config["lr"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(y)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)

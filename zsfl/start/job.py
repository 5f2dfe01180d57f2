"""What is trained, and on what. Every node has a copy of this file and imports it; no node sends it to another.

    zsfl up job.py                     train it: 5 clients and 2 split servers, each a process of this machine
    zsfl up job.py --in-process        the same in one process
    zsfl baseline centralised job.py   what one process with all the data makes of it, to compare

As it stands it trains the handwritten digits of scikit-learn. What is yours to change: model, data, loss, count_right,
and the settings at the end.
"""

from typing import Any

import torch
import torch.nn.functional as F
import zsfl
from torch import Tensor, nn
from torch.utils.data import Dataset


def model() -> zsfl.SplitModel:
    """Your network, in three parts. What the head gives, and nothing else of a sample, leaves the client.

    A network that you have already is cut by the names of its layers:

        return zsfl.split(MyNet(), after="layer1", tail="fc")
    """
    return zsfl.SplitModel(
        head=nn.Sequential(nn.Linear(64, 128), nn.ReLU()),  # on the client
        body=nn.Sequential(nn.Linear(128, 128), nn.ReLU()),  # on whichever split server is free: the heavy part
        tail=nn.Linear(128, 10),  # on the client, so that labels stay there; without a tail they travel
    )


def data(shard: int, shards: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Your data: what the client with this shard, 0 to shards - 1, trains on, and what it holds out to test with.

    Only that client calls this, so on its machine read what lies there, and give None where nothing is held out:

        return TensorDataset(images, labels), None
    """
    return digits(shard, shards)


# One dataset divided among clients, to try things out. by=zsfl.dirichlet_labels(0.5) gives each client other labels.
digits = zsfl.shards(zsfl.digits, by=zsfl.iid())


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Your loss, the mean over the samples of a batch."""
    return F.cross_entropy(output, target)


def count_right(output: Tensor, target: Tensor) -> float:
    """Your metric: how many samples of a batch are right. It is for reports alone; metric=None does without."""
    return float(torch.sum(output.argmax(1) == target))


job = zsfl.Job(
    name="my-job",
    model=model,
    data=data,
    loss=loss,
    metric=count_right,
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),  # or zsfl.adam(lr=1e-3); it makes one step for the batches of all clients
    batch_size=16,  # of each client, on average: 5 clients make steps of 80 samples
    rounds=20,  # in a round the clients go once over their data
    shards=5,  # clients that the data is divided among
    mode="exact",  # waits for everybody; "elastic" goes on without who is slow or away, "async" waits for nobody
    codec="fp16+lz4",  # how tensors travel: "raw" changes no bit, "bf16+shuffle+lz4" and "int8+lz4" are smaller
    # seed=0,  # another one gives other initial weights, and another order of the samples
    # stop_after=5,  # ends early after so many tests without a better one
    # norm_bound=10.0,  # clips gradients of single clients, should some go wrong
)

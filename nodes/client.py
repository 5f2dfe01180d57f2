"""One client: keeps its samples and its labels, trains head and tail, asks split servers for the body.

    python nodes/client.py --shard 0
    python nodes/client.py --shards 1-4        four clients in one process
    python nodes/client.py --shard 0 --host 192.168.1.30 --peer 192.168.1.10:7700

`--help` lists every setting. The client waits for an aggregator and a split server, in whatever order they start.
"""

import sys

import torch.nn as nn
import torch.nn.functional as F

import zsfl


def model() -> zsfl.SplitModel:
    """64 pixels in, 10 digits out. The same code on every node: a peer whose model differs is turned away."""
    return zsfl.SplitModel(
        head=nn.Sequential(nn.Linear(64, 128), nn.ReLU()),  # on the client
        body=nn.Sequential(nn.Linear(128, 128), nn.ReLU()),  # on whichever split server is free
        tail=nn.Linear(128, 10),  # on the client again, so that labels stay there
    )


job = zsfl.Job(
    name="digits",
    model=model,
    loss=F.cross_entropy,
    data=zsfl.shards(zsfl.digits, by=zsfl.iid()),  # only its own shard is ever asked for
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),
    batch_size=16,
    rounds=20,
    shards=5,
    codec="fp16+lz4",
)

if __name__ == "__main__":
    sys.exit(zsfl.main("client", job))

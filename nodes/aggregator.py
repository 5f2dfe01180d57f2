"""The aggregator: averages what the others computed, steps the model, publishes it, and keeps the run's results.

    python nodes/aggregator.py
    python nodes/aggregator.py --host 192.168.1.10 --port 7700 --rounds 5 --run first
    python nodes/aggregator.py --run first --rounds 20 --resume

It begins once a client for every shard and one split server are there, and leaves the results in runs/NAME.
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
    data=zsfl.shards(zsfl.digits, by=zsfl.iid()),  # never read on this node
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),  # runs here and nowhere else
    batch_size=16,
    rounds=20,
    shards=5,
    codec="fp16+lz4",
)

if __name__ == "__main__":
    sys.exit(zsfl.main("aggregator", job))

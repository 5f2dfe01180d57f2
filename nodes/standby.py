"""An aggregator that stands by: keeps a copy of the run, and takes over when the one that leads is gone.

    python nodes/standby.py
    python nodes/standby.py --host 192.168.1.11 --peer 192.168.1.10:7700

Start it on another machine than the aggregator. Its copy is in runs/NAME.standby-HOST, and so are the results once it
has taken over. The other aggregator stands by when it is back.
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
    sys.exit(zsfl.main("standby", job))

"""One split server: runs the body for whoever asks, on a GPU if there is one. Start as many as you have.

    python nodes/split_server.py
    python nodes/split_server.py --host 192.168.1.20 --device cuda

It may come and go while others train: it holds nothing that another could not compute again.
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
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),
    batch_size=16,
    rounds=20,
    shards=5,
    codec="fp16+lz4",
)

if __name__ == "__main__":
    sys.exit(zsfl.main("split-server", job))

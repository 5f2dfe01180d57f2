"""MicroSFL's network on MNIST with a trainable head: 784-64 | 64-64 ReLU | 64-10, U-shaped.

Wants the IDX files in the folder that ZSFL_DATA names, or in `mnist` below it.
"""

from functools import partial

import torch.nn as nn
import torch.nn.functional as F

import zsfl


def model() -> zsfl.SplitModel:
    return zsfl.SplitModel(
        head=nn.Linear(784, 64),
        body=nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        tail=nn.Linear(64, 10),
    )


job = zsfl.Job(
    name="mnist",
    model=model,
    loss=F.cross_entropy,
    data=zsfl.shards(partial(zsfl.mnist, flat=True), by=zsfl.iid()),
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),
    batch_size=64,
    rounds=10,
    shards=20,
)

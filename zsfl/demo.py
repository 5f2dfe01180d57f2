"""The job of `zsfl demo`: handwritten digits, 8x8 pixels, that scikit-learn ships. Copy it to begin your own."""

import torch.nn as nn
import torch.nn.functional as F

import zsfl


def model() -> zsfl.SplitModel:
    """64 pixels in, 10 digits out; the body is what the split servers run."""
    return zsfl.SplitModel(
        head=nn.Sequential(nn.Linear(64, 128), nn.ReLU()),
        body=nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
        tail=nn.Linear(128, 10),
    )


job = zsfl.Job(
    name="digits",
    model=model,
    loss=F.cross_entropy,
    data=zsfl.shards(zsfl.digits, by=zsfl.iid()),
    optimizer=zsfl.sgd(lr=0.1, momentum=0.9),
    batch_size=16,
    rounds=20,
    shards=5,
    codec="fp16+lz4",
)

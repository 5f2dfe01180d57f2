"""As mnist_double.py, with clients that have different labels: by Dirichlet(0.5)."""

import dataclasses
from functools import partial

import mnist_double

import zsfl

data = zsfl.shards(partial(zsfl.mnist, flat=True), by=zsfl.dirichlet_labels(0.5))
job = dataclasses.replace(mnist_double.job, name="mnist-labels", data=data)

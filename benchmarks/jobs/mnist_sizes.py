"""As mnist_double.py, with clients of uneven size: by Dirichlet(5.0)."""

import dataclasses
from functools import partial

import mnist_double

import zsfl

data = zsfl.shards(partial(zsfl.mnist, flat=True), by=zsfl.dirichlet_sizes(5.0))
job = dataclasses.replace(mnist_double.job, name="mnist-sizes", data=data)

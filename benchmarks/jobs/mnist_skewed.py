"""As mnist.py, with clients that have one or two labels each, more or less: by Dirichlet(0.1)."""

import dataclasses
from functools import partial

import mnist

import zsfl

data = zsfl.shards(partial(zsfl.mnist, flat=True), by=zsfl.dirichlet_labels(0.1))
job = dataclasses.replace(mnist.job, name="mnist-skewed", data=data)

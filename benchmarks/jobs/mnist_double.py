"""As mnist.py, in float64: with few clients, float32's rounding alone moves the accuracy by a point in ten rounds."""

import dataclasses

import mnist
import torch
import torch.nn as nn

import zsfl


class ToDouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def model() -> zsfl.SplitModel:
    single = mnist.model().double()
    return zsfl.SplitModel(head=nn.Sequential(ToDouble(), single.head), body=single.body, tail=single.tail)


job = dataclasses.replace(mnist.job, name="mnist-double", model=model)

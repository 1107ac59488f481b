"""One small network of every kind of cell: what tests and benchmarks transform."""

from __future__ import annotations

from raysys.federated.fedtrans.attention import Attention, Patches
from raysys.federated.fedtrans.cells import Conv, Dense, DenseResidual, Depthwise, ResidualConv
from raysys.federated.fedtrans.network import CellNet

ZOO = {
    "perceptron": CellNet(shape=(1, 8, 8), cells=(Dense(width=5), Dense(width=3))),
    "residual, tanh and gelu": CellNet(
        shape=(20,),
        cells=(Dense(width=5, activation="tanh"), DenseResidual(inner=3, activation="gelu")),
    ),
    "convolutional": CellNet(
        shape=(1, 8, 8), cells=(Conv(channels=4, pool=True), Conv(channels=6), Dense(width=7))
    ),
    "group norm, residual, depthwise": CellNet(
        shape=(3, 8, 8),
        cells=(
            Conv(channels=4, group_size=2),
            ResidualConv(inner=6, group_size=3),
            Depthwise(),
            ResidualConv(inner=2),
            Conv(channels=3, pool=True),
        ),
    ),
    "attention": CellNet(
        shape=(1, 8, 8),
        cells=(
            Patches(patch=4, dim=6),
            Attention(heads=3, head_dim=2, mlp=5),
            Attention(heads=1, head_dim=4, mlp=3),
        ),
    ),
}

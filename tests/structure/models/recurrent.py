"""Recurrences: torch's RNNs, cells in a loop, a scan in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import SEQUENCE, Cases

__all__ = ["CASES"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.cells = kind(5, 8, batch_first=True, **options)  # type: ignore[arg-type]
        wide = 8 * (2 if self.cells.bidirectional else 1)
        self.hidden, self.out = nn.Linear(wide, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.cells(x)[0]).relu())


class ProjectedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(5, 8, proj_size=4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


class Scan(nn.Module):
    """A diagonal recurrence written as a loop (an SSM in plain torch)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 8
        self.enter, self.out = nn.Linear(5, 16), nn.Linear(8, 3)
        self.log_decay, self.skip = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.enter(x).split([self.inner, self.inner], dim=-1)
        state = torch.zeros(x.shape[0], self.inner)
        states = []
        for t in range(x.shape[1]):
            state = torch.exp(-self.log_decay.exp()) * state + value[:, t]
            states.append(state + self.skip * value[:, t])
        return self.out(torch.stack(states, 1) * F.silu(gate))


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.GRUCell(5, 8), nn.LSTMCell(8, 6), nn.Linear(6, 2)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = x.new_zeros(len(x), self.width), None
        for t in range(x.shape[1]):
            hidden = self.first(x[:, t], hidden)
            state = self.second(hidden, state)
        assert state is not None
        return self.out(state[0])


class LstmByHand(nn.Module):
    """Four gates of one product, cut by multiples of the width, as it is often written."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(5, 32), nn.Linear(8, 32, bias=False)
        self.width, self.out = 8, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = self.width
        hidden, cell = torch.zeros(len(x), n), torch.zeros(len(x), n)
        for step in x.unbind(1):
            gates = self.enter(step) + self.again(hidden)
            add, keep = torch.sigmoid(gates[:, :n]), torch.sigmoid(gates[:, n : n * 2])
            new, tell = torch.tanh(gates[:, n * 2 : n * 3]), torch.sigmoid(gates[:, n * 3 :])
            cell = keep * cell + add * new
            hidden = tell * torch.tanh(cell)
        return self.out(hidden)


CASES: Cases = {
    "lstm_by_hand": (LstmByHand, SEQUENCE, [8]),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE, [6, 8]),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, [6, 8]),
    "lstm_bidirectional": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE, [6, 8]),
    "lstm_projected": (ProjectedLstm, SEQUENCE, [4]),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE, [6, 8]),
    "scan": (Scan, SEQUENCE, [8]),
    "cell_loop": (CellLoop, SEQUENCE, [6, 8]),
}

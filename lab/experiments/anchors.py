"""Ordered anchor prototypes: prototypes for a regression, at ascending values, with a line between each two.

A sample's target is the point of its value on that line; a classifier's is the prototype of its class.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("sliding, attraction only", "sliding, with contrast", "trained, with contrast")
GAMMA = 0.01  # of Eq. 1
WIDTH = 64  # of h'
EPOCHS, BATCH, LR = 5, 64, 1e-3
CONTRAST = 0.1  # temperature of the contrast in training
TEMPERATURES = torch.logspace(-2.5, 1, 36)
STEP = 0.1  # of values, in the search for the nearest point of the line
ALTERNATIVE = 1.0  # distance of its rivals from the head's value, for the distance ratio


def hats(values: Tensor, anchors: Tensor) -> Tensor:
    """The shares of the anchors (K,), ascending, in each value (…): (…, K), at most two above 0, with the sum 1.

    A value beyond the first or the last anchor is that anchor's.
    """
    values = values.clamp(anchors[0], anchors[-1])
    upper = torch.searchsorted(anchors, values.contiguous()).clamp(1, len(anchors) - 1)
    share = (values - anchors[upper - 1]) / (anchors[upper] - anchors[upper - 1])
    result = values.new_zeros(*values.shape, len(anchors))
    result.scatter_(-1, (upper - 1)[..., None], (1 - share)[..., None])
    return result.scatter_(-1, upper[..., None], share[..., None])


def distance_to(units: Tensor, points: Tensor, shares: Tensor) -> Tensor:
    """Cosine distances, (n, exits), of unit h' (n, exits, d) to points between the anchors' (exits, K, d) unit points.

    shares: (n, exits, K), as hats gives them.
    """
    between = torch.einsum("nek,ekd->ned", shares, points)
    return 1 - (units * F.normalize(between, dim=-1)).sum(-1)


@dataclass
class Anchors:
    """Prototypical networks h' = W·(h − mean) + b with anchors, one of each at every exit.

    Attributes:
        values: of the anchors, (K,), ascending.
        mean: of the training states, (exits, hidden).
        weight, bias: (exits, hidden, d) and (exits, d).
        points: the anchors in the space of h', (exits, K, d).
    """

    values: Tensor
    mean: Tensor
    weight: Tensor
    bias: Tensor
    points: Tensor

    @classmethod
    def fit(cls, states: Tensor, labels: Tensor, values: Tensor, kind: str, seed: int) -> Self:
        """Train on pooled states (n, exits, hidden) and labels (n,).

        The loss is the cosine distance to the label's point. It only attracts, and is 0 if all anchors are one; the
        contrast prevents that: the cross-entropy of a softmax over the anchors, with the label's shares as target.
        Sliding anchors are moving averages (Eq. 1) of h', weighted by the labels' shares; trained ones are parameters.
        At the end sliding anchors are those whose line has the least squared distance to all h'.
        """
        generator = torch.Generator().manual_seed(seed)
        (n, exits, hidden), mean = states.shape, states.mean(0)
        weight = (0.02 * torch.randn(exits, hidden, WIDTH, generator=generator)).requires_grad_()
        bias = torch.zeros(exits, WIDTH, requires_grad=True)
        shares = hats(labels, values)
        slides, contrasts = kind.startswith("sliding"), kind.endswith("contrast")
        model = cls(values, mean, weight, bias, torch.empty(0))
        with torch.no_grad():
            model.points = _means(model.embed(states), shares)
        parameters = [weight, bias] if slides else [weight, bias, model.points.requires_grad_()]
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
        steps, step = EPOCHS * -(-n // BATCH), 0
        for _ in range(EPOCHS):
            for rows in torch.randperm(n, generator=generator).split(BATCH):
                embedded, batch = model.embed(states[rows]), shares[rows]
                if slides:
                    model.slide(embedded.detach(), batch)
                loss = model.loss(embedded, batch, contrasts)
                loss.backward()
                optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        for tensor in parameters:
            tensor.requires_grad_(False)
        if slides:
            embedded = model.embed(states).transpose(0, 1)  # (exits, n, d)
            model.points = torch.linalg.lstsq(shares.expand(exits, -1, -1), embedded).solution
        return model

    def embed(self, states: Tensor) -> Tensor:
        """h', (n, exits, d), of pooled states (n, exits, hidden)."""
        return torch.einsum("neh,ehd->ned", states - self.mean, self.weight) + self.bias

    def slide(self, embedded: Tensor, shares: Tensor) -> None:
        """One step of the moving averages; an anchor of which the batch has less than one sample moves less."""
        factor = GAMMA * shares.sum(0).clamp(max=1)[:, None]
        self.points = self.points + factor * (_means(embedded, shares) - self.points)

    def loss(self, embedded: Tensor, shares: Tensor, contrasts: bool) -> Tensor:
        """The sum over exits of the mean loss of samples, h' (n, exits, d), with their labels' shares (n, K)."""
        units, points = F.normalize(embedded, dim=-1), F.normalize(self.points, dim=-1)
        loss = distance_to(units, points, shares[:, None].expand(-1, len(points), -1))
        if contrasts:
            similar = torch.einsum("ned,ekd->nek", units, points)
            loss = loss - (shares[:, None] * F.log_softmax(similar / CONTRAST, -1)).sum(-1)
        return loss.mean(0).sum()

    def similarities(self, states: Tensor) -> Tensor:
        """The cosine of h' with each anchor, (n, exits, K)."""
        units = F.normalize(self.embed(states), dim=-1)
        return torch.einsum("ned,ekd->nek", units, F.normalize(self.points, dim=-1))

    def read(self, states: Tensor, temperatures: Tensor) -> Tensor:
        """Values by the anchors, (n, exits): their mean by a softmax of the cosines; temperatures (exits,)."""
        shares = (self.similarities(states) / temperatures[:, None]).softmax(-1)
        return shares @ self.values

    def temperatures(self, states: Tensor, labels: Tensor) -> Tensor:
        """The temperature of each exit with the least squared error of the values read, (exits,)."""
        similar = self.similarities(states)
        read = torch.stack([(similar / t).softmax(-1) @ self.values for t in TEMPERATURES])
        return TEMPERATURES[(read - labels[:, None]).square().mean(1).argmin(0)]

    def geometry(self, states: Tensor, values: Tensor, temperatures: Tensor) -> Tensor:
        """Features of exits whose heads give values (n, exits), from the anchors: (n, exits, 3).

        They are the distance of the value read from the anchors to the head's; the distance ratio; and the log of the
        distance to the nearest point of the line. The ratio is ½(1 + (r1 − r2)/max(r1, r2)), r1 the distance to the
        point of the head's value, r2 that to the nearer one of the points one unit below and above.
        """
        units, points = F.normalize(self.embed(states), dim=-1), F.normalize(self.points, dim=-1)
        low, high = float(self.values[0]), float(self.values[-1])

        def to(wanted: Tensor) -> Tensor:
            return distance_to(units, points, hats(wanted, self.values)).clamp(min=1e-6)

        own = to(values := values.clamp(low, high))
        rivals = []
        for rival in (values - ALTERNATIVE, values + ALTERNATIVE):
            inside = (rival >= low) & (rival <= high)
            rivals.append(torch.where(inside, to(rival), torch.inf))
        other = torch.minimum(*rivals)
        ratio = 0.5 * (1 + (own - other) / torch.maximum(own, other))
        line = torch.arange(low, high + STEP / 2, STEP)
        nearest = torch.stack([to(y.expand_as(values)) for y in line]).amin(0)
        disagreement = (self.read(states, temperatures) - values).abs()
        return torch.stack([disagreement, ratio, nearest.log()], -1)


def _means(embedded: Tensor, shares: Tensor) -> Tensor:
    """The mean of h' (n, exits, d) for each anchor, weighted by shares (n, K): (exits, K, d)."""
    return torch.einsum("ned,nk->ekd", embedded, shares) / shares.sum(0).clamp(min=1e-6)[:, None]

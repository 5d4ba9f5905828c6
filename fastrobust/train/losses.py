"""The losses that a config can name (`loss`): of logits, float N x classes, and labels, int64 N or shares of the classes,
float N x classes. Each is the mean over the batch (shape [])."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def boosted(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy plus -log(1 - p_k), p_k being the largest probability of a class that is not the label: the boosted
    cross-entropy of MART (Wang et al., 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples").
    Of shares the largest is the label.

    1 - p_k is the sigmoid of (logsumexp of all logits but k's, less k's): nothing is rounded to 0, and the gradients of
    confident examples keep their digits."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    label = y if y.dim() == 1 else y.argmax(1)
    largest = logits.masked_fill(classes == label[:, None], -torch.inf).argmax(1)
    k = classes == largest[:, None]
    above = logits.masked_fill(k, -torch.inf).logsumexp(1) - torch.where(k, logits, 0.0).sum(1)
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing) - F.logsigmoid(above).mean()


LOSSES = {"cross_entropy": F.cross_entropy, "boosted": boosted}

"""Losses of supervised ReID in fp32: smoothed cross-entropy, optionally with a margin, and the batch-hard triplet loss."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.reid.heads import Outputs

Classifier = Literal["linear", "circle", "arc"]


def smoothed_cross_entropy(
    logits: Float[Tensor, "B N"], labels: Int[Tensor, " B"], *, smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy with 1 - ``smoothing`` on the true class and the rest shared by the N - 1 wrong ones.

    PyTorch's own option gives the true class a share of the rest too. LUPerson's recipe does not.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    true = log_probs.gather(1, labels[:, None]).squeeze(1)
    wrong = (log_probs.sum(dim=-1) - true) / max(logits.shape[-1] - 1, 1)
    return -((1 - smoothing) * true + smoothing * wrong).mean()


def circle_softmax_logits(
    cosine: Float[Tensor, "B N"], labels: Int[Tensor, " B"], *, scale: float = 64.0, margin: float = 0.35
) -> Float[Tensor, "B N"]:
    """Scores of the circle loss with class weights (arXiv 2002.10857, Sec. 3.2): ``scale`` * alpha * (cosine - delta).

    True class: alpha = 1 + margin - cosine, delta = 1 - margin. Wrong ones: alpha = cosine + margin or zero if that is
    negative, delta = margin. Alpha carries no gradient.
    """
    cosine = cosine.float()
    fixed = cosine.detach()
    true = (1 + margin - fixed) * (cosine - 1 + margin)
    wrong = (fixed + margin).clamp(min=0) * (cosine - margin)
    return scale * torch.where(_is_true(cosine, labels), true, wrong)


def arc_softmax_logits(
    cosine: Float[Tensor, "B N"], labels: Int[Tensor, " B"], *, scale: float = 64.0, margin: float = 0.35
) -> Float[Tensor, "B N"]:
    """Scores with ``margin`` radians added to the angle of the true class (arXiv 1801.07698): ``scale`` * cos(angle + margin).

    Beyond pi - margin, where that cosine would rise again, the true class has cosine - margin * sin(margin). The gradient is
    finite everywhere: that of the sine is zero at an angle of 0.
    """
    cosine = cosine.float()
    sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
    added = cosine * math.cos(margin) - sine * math.sin(margin)
    true = torch.where(cosine > -math.cos(margin), added, cosine - margin * math.sin(margin))
    return scale * torch.where(_is_true(cosine, labels), true, cosine)


def _is_true(scores: Float[Tensor, "B N"], labels: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    return labels[:, None] == torch.arange(scores.shape[1], device=scores.device)


def pairwise_distances(embeddings: Float[Tensor, "B F"]) -> Float[Tensor, "B B"]:
    """Euclidean distances in fp32. The gradient at distance zero is zero.

    Differences are taken before they are squared: |x|² + |y|² - 2xy loses close pairs.
    """
    embeddings = embeddings.float()
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def batch_hard_triplet(
    embeddings: Float[Tensor, "B F"], labels: Int[Tensor, " B"], *, margin: float | None = None
) -> Float[Tensor, ""]:
    """Farthest positive against nearest negative of every anchor (arXiv 1703.07737).

    Without ``margin`` the soft margin log(1 + exp(d_p - d_n)), otherwise max(0, d_p - d_n + margin). The mean is over
    the anchors that have both a positive and a negative, and zero without any.
    """
    distances = pairwise_distances(embeddings)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # An anchor without a positive or a negative ends at -inf, where both forms are zero and so is their gradient.
    farthest = distances.masked_fill(~positive, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    gap = farthest - nearest
    terms = F.softplus(gap) if margin is None else F.relu(gap + margin)
    valid = positive.any(dim=1) & ~same.all(dim=1)
    return terms.sum() / valid.sum().clamp(min=1)


def reid_loss(
    outputs: Outputs,
    labels: Int[Tensor, " B"],
    embedding_labels: Int[Tensor, " G"] | None = None,
    *,
    smoothing: float = 0.1,
    margin: float | None = None,
    triplet_weight: float = 1.0,
    classifier: Classifier = "linear",
    class_margin: float = 0.35,
    scale: float = 64.0,
) -> dict[str, Float[Tensor, ""]]:
    """Loss of a model's training outputs: mean over its classifiers plus mean over its triplet vectors.

    For MGN that is 1/8 per classifier and 1/5 per triplet vector, for BNNeck 1 and 1. ``embedding_labels`` are those of the
    triplet vectors where they are gathered from all ranks and the logits are not. ``classifier`` "circle" and "arc" take the
    outputs' logits for cosines. ``class_margin`` and ``scale`` are theirs.

    Returns:
        ``loss`` (with gradient), and for the log ``id_loss``, ``triplet_loss`` and the first classifier's ``accuracy``.
    """
    logits = outputs["logits"]
    if classifier != "linear":
        with_margin = {"circle": circle_softmax_logits, "arc": arc_softmax_logits}[classifier]
        logits = [with_margin(cosine, labels, scale=scale, margin=class_margin) for cosine in logits]
    id_loss = torch.stack([smoothed_cross_entropy(scores, labels, smoothing=smoothing) for scores in logits]).mean()
    mined = labels if embedding_labels is None else embedding_labels
    triplet_loss = torch.stack([batch_hard_triplet(vectors, mined, margin=margin) for vectors in outputs["embeddings"]]).mean()
    accuracy = (outputs["logits"][0].argmax(dim=1) == labels).float().mean()
    return {
        "loss": id_loss + triplet_weight * triplet_loss,
        "id_loss": id_loss.detach(),
        "triplet_loss": triplet_loss.detach(),
        "accuracy": accuracy,
    }

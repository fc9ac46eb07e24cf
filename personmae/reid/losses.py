"""Losses of supervised ReID: label-smoothed cross-entropy and the batch-hard triplet loss, both in fp32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from personmae.reid.heads import Outputs


def smoothed_cross_entropy(
    logits: Float[Tensor, "B N"], labels: Int[Tensor, " B"], *, smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy with 1 - ``smoothing`` on the true class and the rest shared by the N - 1 wrong ones.

    PyTorch's own option gives the true class a share of the rest too; LUPerson's recipe does not.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    true = log_probs.gather(1, labels[:, None]).squeeze(1)
    wrong = (log_probs.sum(dim=-1) - true) / max(logits.shape[-1] - 1, 1)
    return -((1 - smoothing) * true + smoothing * wrong).mean()


def pairwise_distances(embeddings: Float[Tensor, "B F"]) -> Float[Tensor, "B B"]:
    """Euclidean distances in fp32; the gradient at distance zero is zero.

    Differences are taken before they are squared: |x|² + |y|² - 2xy loses close pairs.
    """
    embeddings = embeddings.float()
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def batch_hard_triplet(
    embeddings: Float[Tensor, "B F"], labels: Int[Tensor, " B"], *, margin: float | None = None
) -> Float[Tensor, ""]:
    """Farthest positive against nearest negative of every anchor (arXiv 1703.07737).

    Soft margin, log(1 + exp(d_p - d_n)), without ``margin``; else max(0, d_p - d_n + margin). The mean is over the
    anchors that have both a positive and a negative; zero if there is none.
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
    *,
    smoothing: float = 0.1,
    margin: float | None = None,
    triplet_weight: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """Loss of a model's training outputs: mean over its classifiers plus mean over its triplet vectors.

    For MGN that is 1/8 per classifier and 1/5 per triplet vector, for BNNeck 1 and 1.

    Returns:
        ``loss`` (with gradient), and for the log ``id_loss``, ``triplet_loss`` and the first classifier's ``accuracy``.
    """
    id_loss = torch.stack([smoothed_cross_entropy(logits, labels, smoothing=smoothing) for logits in outputs["logits"]]).mean()
    triplet_loss = torch.stack(
        [batch_hard_triplet(embeddings, labels, margin=margin) for embeddings in outputs["embeddings"]]
    ).mean()
    accuracy = (outputs["logits"][0].argmax(dim=1) == labels).float().mean()
    return {
        "loss": id_loss + triplet_weight * triplet_loss,
        "id_loss": id_loss.detach(),
        "triplet_loss": triplet_loss.detach(),
        "accuracy": accuracy,
    }

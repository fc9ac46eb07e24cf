"""Re-ranking: similarities that also use the neighbourhoods of query and gallery, in place of the cosine.

No label is used. A query's result depends on the whole gallery. With ``k_reciprocal`` it depends on the other queries too,
as in the literature.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from personmae.reid.cluster import k_reciprocal_encoding, minimum_sums
from personmae.reid.ranking import BLOCK_SIZE, Similarity, cosine


def alpha_query_expansion(
    query_features: Float[Tensor, "Q F"], gallery_features: Float[Tensor, "G F"], *, k: int = 5, alpha: float = 3.0
) -> Similarity:
    """Cosine between the gallery and each query moved towards its ``k`` nearest gallery images (arXiv 1711.02512).

    The new query is the sum of the old one, with weight 1, and of those images, with weight cosine ** ``alpha``, or none
    where the cosine is not positive. With ``alpha`` 0 this is average query expansion.

    Raises:
        UserError: a feature is not finite.
    """
    similarity = cosine(query_features, gallery_features)
    expanded = []
    for start in range(0, len(query_features), BLOCK_SIZE):
        queries = query_features[start : start + BLOCK_SIZE]
        near = similarity(np.arange(start, start + len(queries))).topk(min(k, len(gallery_features)), dim=1)
        weights = torch.where(near.values > 0, near.values.clamp(min=0) ** alpha, 0)
        images = F.normalize(gallery_features[near.indices].float(), dim=2)
        expanded.append(F.normalize(queries.float(), dim=1) + torch.einsum("bk,bkf->bf", weights, images))
    return cosine(torch.cat(expanded), gallery_features)


def k_reciprocal(
    query_features: Float[Tensor, "Q F"],
    gallery_features: Float[Tensor, "G F"],
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Similarity:
    """Minus the distance of k-reciprocal re-ranking (arXiv 1701.08398): that is, of the images' neighbours and their own.

    The distance is 1 - ``lambda_value`` times the Jaccard distance plus ``lambda_value`` times the original one, which is
    2 - 2 cos over the largest to any image, so that both lie in [0, 1]. As in the authors' code, ``k1`` does not count the
    image itself and ``k2`` does. Memory besides features is 8 bytes for each query and gallery image with a common neighbour.

    Raises:
        UserError: a feature is not finite.
    """
    num_queries = len(query_features)
    features = F.normalize(torch.cat([query_features, gallery_features]).detach().float(), dim=1)
    similarity = cosine(features[:num_queries], features[num_queries:])
    spread = _spread(features)
    encoding = k_reciprocal_encoding(features, k1 + 1, k2, half_k1=round(k1 / 2) + 1, spread=spread)
    sums = [sparse.csr_array(s[:, num_queries:].astype(np.float32)) for _, s in minimum_sums(encoding, num_queries)]
    common = sparse.csr_array(sparse.vstack(sums, format="csr"))

    def block(queries: Int[np.ndarray, " b"]) -> Float[Tensor, "b G"]:
        original = 2 - 2 * similarity(queries)
        original /= spread[torch.from_numpy(queries).to(spread.device), None]
        shared = torch.from_numpy(common[queries].toarray()).to(original.device)
        jaccard = 1 - shared / (2 - shared)  # the rows of an encoding sum to one
        return -(lambda_value * original + (1 - lambda_value) * jaccard)

    return block


def _spread(features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
    """Distance of each image to the one farthest from it. Features have length one."""
    least = [(rows @ features.T).amin(dim=1) for rows in features.split(BLOCK_SIZE)]
    return (2 - 2 * torch.cat(least)).clamp(min=1e-6)

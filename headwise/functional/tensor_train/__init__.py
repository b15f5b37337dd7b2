"""Tensor trains (Oseledets 2011), and matrices in that form (Novikov et al. 2015).

    A[i_1, …, i_d] = G_1[i_1] G_2[i_2] … G_d[i_d]

with a matrix `G_k[i_k]` of size `(r_{k-1}, r_k)` and `r_0 = r_d = 1`: core k is `(r_{k-1}, n_k, r_k)`. A
matrix `(M, N)` takes row and column index apart, `M = Π m_k` and `N = Π n_k`, and core k is `(r_{k-1}, m_k,
n_k, r_k)`.
"""

from headwise.functional.tensor_train.contraction import Plan, backward_products, plan
from headwise.functional.tensor_train.decomposition import (
    maximal_ranks,
    reconstruct,
    tensor_train,
    tensor_train_matrix,
    truncation_errors,
)
from headwise.functional.tensor_train.factors import even_factors, exact_factors
from headwise.functional.tensor_train.op import FLOP_FORMULAS, tensor_train_linear

__all__ = [
    "FLOP_FORMULAS", "Plan", "backward_products", "even_factors", "exact_factors", "maximal_ranks", "plan",
    "reconstruct", "tensor_train", "tensor_train_linear", "tensor_train_matrix", "truncation_errors",
]  # fmt: skip

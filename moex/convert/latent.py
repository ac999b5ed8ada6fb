"""Trained experts as latent ones: the factors of their weights, and what they lose.

Pure functions of numpy arrays, in float64. Reading and writing runs: `apply.py`.

E experts · n experts of a group · G groups · D model width · F expert width · Z latent
width
"""

import dataclasses

import numpy as np

# Added to the second moment of the inputs, over its mean eigenvalue: directions that
# the calibration did not see still count a little, and the factor has an inverse.
RIDGE = 1e-4
# The least share of a direction in balancing: a direction of weight 0 would get two
# zero factors, and zero gradients ever after.
GAUGE_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factoring:
    """How experts are factored."""

    latent: int  # width Z of a shared space, 1 <= latent <= D
    group: int  # experts n that share a space; the last group may be smaller
    # Rank to which each expert is cut first (the paper's phase 1), at least 1; more
    # than min(D, F) is all. None: not cut, which is never worse.
    rank: int | None = None
    # Own factors from the weights before the cut; without a cut no difference.
    refit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorError:
    """The errors of one group, as shares of the norm of its weights."""

    error: float  # |W - B A| / |W|, Frobenius norms over all experts of the group
    # Root of the sum of the squared singular values dropped from the shared space, over
    # the norm of what was factored. Without a cut it is `error`; with whitening
    # `output_error`, up to the ridge.
    tail: float
    # Root of the mean square of x (W - B A) over that of x W, for inputs with the
    # second moment given; None without one.
    output_error: float | None = None


def factor_experts(w_EDF, how: Factoring, moment_DD=None):
    """Factor experts y = x W^e as x B^g A^e, with g = e // group.

    Per group the experts stand side by side, [D, n F]; its first Z left singular
    vectors U are B, and A = U^T W. No other B and A are closer in the Frobenius norm
    (Eckart and Young 1936).

    With a second moment Sigma = E[x^T x] of the inputs (x a row) the error that counts
    is E|x (W - B A)|^2 = |L^T (W - B A)|^2, Sigma = L L^T: L^T W is factored as U A,
    and B = L^-T U. An extension, not of the paper.

    Args:
      moment_DD: float[D, D], or None.

    Returns:
      (b_GDZ float64, a_EZF float64, list of G `FactorError`).

    Source: the two-phase conversion of MoLE / MoLAE, arXiv:2503.23100 (its text was not
    available to us, see docs/fidelity.md). Theirs has weights on the left of x.
    """
    w_EDF = np.asarray(w_EDF, np.float64)
    b_GDZ, a_EZF, errors = [], [], []
    for first in range(0, len(w_EDF), how.group):
        w_nDF = w_EDF[first : first + how.group]
        b_DZ, a_nZF, error = _factor_group(w_nDF, how, moment_DD)
        b_GDZ.append(b_DZ)
        a_EZF.extend(a_nZF)
        errors.append(error)
    return np.stack(b_GDZ), np.stack(a_EZF), errors


def _factor_group(w_nDF, how, moment_DD):
    root_DD, inverse_DD = whitening(moment_DD, w_nDF.shape[1])
    white_nDF = root_DD @ w_nDF
    cut_nDF = white_nDF if how.rank is None else truncated(white_nDF, how.rank)
    u_DZ, dropped = shared_space(cut_nDF, how.latent)
    a_nZF = u_DZ.T @ (white_nDF if how.refit else cut_nDF)
    b_DZ = inverse_DD @ u_DZ
    rest_nDF = w_nDF - b_DZ @ a_nZF
    output_error = None
    if moment_DD is not None:
        output_error = _share(_output(rest_nDF, moment_DD), _output(w_nDF, moment_DD))
    error = FactorError(
        error=_share(np.linalg.norm(rest_nDF), np.linalg.norm(w_nDF)),
        tail=_share(dropped, np.linalg.norm(white_nDF)),
        output_error=output_error,
    )
    return *balance(b_DZ, a_nZF), error


def _output(w_nDF, moment_DD) -> float:
    """Root mean square norm of x W over all experts."""
    return float(np.sqrt(max(np.sum(w_nDF * (moment_DD @ w_nDF)), 0.0)))


def _share(part, whole) -> float:
    return float(part / whole) if whole > 0 else 0.0


def shared_space(w_nDF, latent):
    """`(u_DZ, dropped)`: the best orthonormal basis, and the norm of what it misses."""
    stack_DC = np.concatenate(list(w_nDF), axis=1)
    D, C = stack_DC.shape
    # A short last group may have fewer columns than Z: other directions fill up.
    u_DD, s, _ = np.linalg.svd(stack_DC, full_matrices=D > C)
    return u_DD[:, :latent], float(np.linalg.norm(s[latent:]))


def truncated(w_nDF, rank):
    """Each matrix cut to its `rank` largest singular values (phase 1)."""
    u_nDR, s_nR, v_nRF = np.linalg.svd(w_nDF, full_matrices=False)
    s_nR[:, rank:] = 0
    return (u_nDR * s_nR[:, None, :]) @ v_nRF


def whitening(moment_DD, dim):
    """`(L^T, L^-T)`, each [D, D], of a second moment with a ridge; identities if None.

    L = V sqrt(lambda) from the eigenvectors: unlike Cholesky's it exists for any
    moment, even of fewer tokens than D.
    """
    if moment_DD is None or not np.any(moment_DD):
        return np.eye(dim), np.eye(dim)
    value_D, vector_DD = np.linalg.eigh(np.asarray(moment_DD, np.float64))
    root_D = np.sqrt(np.maximum(value_D, 0) + RIDGE * max(value_D.mean(), 0))
    return root_D[:, None] * vector_DD.T, vector_DD / root_D


def balance(b_DZ, a_nZF):
    """Rescale the factors: the same product, equal norms in each latent direction.

    Without whitening this is the root of the singular values on each side. Of all
    gauges it has the least sum of squares, so that weight decay and the norms of
    gradients treat both factors alike when the experts are tuned; with everything in
    the experts' factors B is orthonormal, whatever the scale of the weights.
    """
    a_Z = np.linalg.norm(a_nZF, axis=(0, 2))
    b_Z = np.linalg.norm(b_DZ, axis=0)
    if not a_Z.any():
        return b_DZ, a_nZF
    a_Z = np.maximum(a_Z, GAUGE_FLOOR * a_Z.max())
    scale_Z = np.sqrt(a_Z / b_Z)
    return b_DZ * scale_Z, a_nZF / scale_Z[:, None]


def convert_experts(weights: dict, ops, how: Factoring, moment_DD=None):
    """Parameters of `GluExperts` as those of `LatentExperts`.

    The moment is for gate and up alone: the inputs of down are another set for every
    expert, so down is always factored by its weights.

    Args:
      weights: {"w_in_ED2F", "w_out_EFD"}.

    Returns:
      (parameters by name, float32; {op: list of `FactorError` by group}).
    """
    w_in_ED2F = np.asarray(weights["w_in_ED2F"])
    params: dict[str, np.ndarray] = {}
    errors: dict[str, list[FactorError]] = {}
    for i, op in enumerate(("gate", "up")):
        w_EDF = w_in_ED2F[:, :, i]
        if op in ops:
            b_GDZ, a_EZF, errors[op] = factor_experts(w_EDF, how, moment_DD)
            params |= {f"b_{op}_GDZ": b_GDZ, f"a_{op}_EZF": a_EZF}
        else:
            params[f"w_{op}_EDF"] = w_EDF
    w_EFD = np.asarray(weights["w_out_EFD"])
    if "down" in ops:  # shares the space of its output: transpose and do the same
        b_GDZ, a_EZF, errors["down"] = factor_experts(w_EFD.swapaxes(1, 2), how)
        params["b_down_GZD"] = b_GDZ.swapaxes(1, 2)
        params["a_down_EFZ"] = a_EZF.swapaxes(1, 2)
    else:
        params["w_down_EFD"] = w_EFD
    return {k: v.astype(np.float32) for k, v in params.items()}, errors

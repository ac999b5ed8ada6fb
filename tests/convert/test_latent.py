"""The factors of latent experts and what they lose, in float64.

E experts · G groups · D model width · F expert width · Z latent width
"""

import numpy as np
import pytest

from moex.convert import latent as latents
from moex.convert.latent import Factoring, factor_experts

E, D, F, GROUP = 4, 32, 8, 4


def random_experts(kind="random", seed=0):
    """float64[E, D, F]: all different, or mostly one shared matrix."""
    rng = np.random.default_rng(seed)
    w_EDF = rng.normal(size=(E, D, F))
    if kind == "shared":
        w_EDF = rng.normal(size=(D, F)) + 0.3 * w_EDF
    return w_EDF


def product(b_GDZ, a_EZF, group):
    """The weights that factors stand for."""
    return np.stack([b_GDZ[e // group] @ a_ZF for e, a_ZF in enumerate(a_EZF)])


def relative_error(w_EDF, **how):
    """Of the factors themselves, not as they are reported."""
    b_GDZ, a_EZF, _ = factor_experts(w_EDF, Factoring(**how))
    rest_EDF = w_EDF - product(b_GDZ, a_EZF, how["group"])
    return np.linalg.norm(rest_EDF) / np.linalg.norm(w_EDF)


def factor(w_EDF, moment_DD=None, **how):
    return factor_experts(w_EDF, Factoring(**{"group": GROUP} | how), moment_DD)


def unbalanced(w_EDF, **how):
    """The factors before their norms are balanced: b is orthonormal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "balance", lambda b_DZ, a_nZF: (b_DZ, a_nZF))
        return factor(w_EDF, **how)


# The factors.


def test_experts_with_a_common_space_are_converted_exactly():
    rng = np.random.default_rng(1)
    w_EDF = rng.normal(size=(1, D, 6)) @ rng.normal(size=(E, 6, F))
    assert relative_error(w_EDF, latent=6, group=GROUP) < 1e-14
    assert relative_error(w_EDF, latent=8, group=GROUP) < 1e-14  # zeros are no harm
    assert relative_error(w_EDF, latent=5, group=GROUP) > 0.01


@pytest.mark.parametrize("kind", ["random", "shared"])
@pytest.mark.parametrize("latent", [1, 8, 31])
def test_the_error_is_the_tail(kind, latent):
    w_EDF = random_experts(kind)
    _, _, [error] = factor(w_EDF, latent=latent)
    found = relative_error(w_EDF, latent=latent, group=GROUP)
    s = np.linalg.svd(np.hstack(list(w_EDF)), compute_uv=False)
    expected = np.linalg.norm(s[latent:]) / np.linalg.norm(s)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(error.error, expected, rtol=1e-12)
    np.testing.assert_allclose(error.tail, expected, rtol=1e-12)
    assert error.output_error is None


def test_the_whole_width_is_exact():
    assert relative_error(random_experts(), latent=D, group=GROUP) < 1e-14


def test_one_expert_a_group_is_exact_at_its_own_width():
    assert relative_error(random_experts(), latent=F, group=1) < 1e-14


@pytest.mark.parametrize("kind", ["random", "shared"])
def test_cutting_first_never_helps(kind):
    w_EDF = random_experts(kind)
    direct = relative_error(w_EDF, latent=F, group=GROUP)
    cut = [relative_error(w_EDF, latent=F, group=GROUP, rank=r) for r in (1, 3, 6)]
    assert min(cut) > direct
    for rank in (F, F + 5, 1000):  # clamped
        full = relative_error(w_EDF, latent=F, group=GROUP, rank=rank)
        np.testing.assert_allclose(full, direct, rtol=1e-12)


@pytest.mark.parametrize("kind", ["random", "shared"])
def test_refitting_after_a_cut_never_hurts(kind):
    w_EDF = random_experts(kind)
    for rank in (1, 3, 6):
        how = {"latent": F, "group": GROUP, "rank": rank}
        assert relative_error(w_EDF, **how, refit=True) < relative_error(w_EDF, **how)
    b_GDZ, _, _ = unbalanced(w_EDF, latent=F, rank=3)
    _, a_EZF, _ = unbalanced(w_EDF, latent=F, rank=3, refit=True)
    fitted = np.stack([np.linalg.lstsq(b_GDZ[0], w, rcond=None)[0] for w in w_EDF])
    np.testing.assert_allclose(a_EZF, fitted, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_balancing_does_not_change_the_product(rank):
    # At rank 2 with latent 16, half of the directions have no weight.
    w_EDF = random_experts()
    how = {"latent": 16, "group": GROUP, "rank": rank}
    b_GDZ, a_EZF, _ = factor(w_EDF, **how)
    ortho_GDZ, own_EZF, _ = unbalanced(w_EDF, **how)
    expected = product(ortho_GDZ, own_EZF, GROUP)
    np.testing.assert_allclose(product(b_GDZ, a_EZF, GROUP), expected, atol=1e-12)
    np.testing.assert_allclose(ortho_GDZ[0].T @ ortho_GDZ[0], np.eye(16), atol=1e-12)
    norm_Z = np.linalg.norm(b_GDZ[0], axis=0)
    if rank is None:
        np.testing.assert_allclose(norm_Z, np.linalg.norm(a_EZF, axis=(0, 2)))
    assert norm_Z.min() > 0.02 * norm_Z.max()  # a direction of no weight can learn


def test_a_short_last_group():
    w_EDF = random_experts()
    b_GDZ, a_EZF, errors = factor(w_EDF, latent=16, group=3)
    assert b_GDZ.shape == (2, D, 16)
    assert a_EZF.shape == (E, 16, F)
    # The last expert has rank 8: alone in a space of 16 it is exact.
    assert errors[1].error < 1e-14
    assert errors[0].error > 0.1
    np.testing.assert_allclose(product(b_GDZ, a_EZF, 3)[3], w_EDF[3], atol=1e-12)


# Whitening.


def anisotropic(seed=3):
    """A second moment whose eigenvalues fall over four decades, and its root."""
    rng = np.random.default_rng(seed)
    q_DD, _ = np.linalg.qr(rng.normal(size=(D, D)))
    root_DD = q_DD * np.logspace(0, -2, D)
    return root_DD @ root_DD.T, root_DD


def test_whitening_lowers_the_error_of_outputs():
    w_EDF = random_experts()
    moment_DD, root_DD = anisotropic()
    x_TD = np.random.default_rng(4).normal(size=(5000, D)) @ root_DD.T

    def output_error(b_GDZ, a_EZF):
        rest_EDF = w_EDF - product(b_GDZ, a_EZF, GROUP)
        return np.linalg.norm(x_TD @ rest_EDF) / np.linalg.norm(x_TD @ w_EDF)

    b_GDZ, a_EZF, [plain] = factor(w_EDF, latent=F)
    b2_GDZ, a2_EZF, [white] = factor(w_EDF, moment_DD, latent=F)
    assert output_error(b2_GDZ, a2_EZF) < 0.5 * output_error(b_GDZ, a_EZF)
    # The report is of the moment, the measure of 5000 inputs with it.
    np.testing.assert_allclose(
        output_error(b2_GDZ, a2_EZF), white.output_error, rtol=0.1
    )
    assert white.error > plain.error  # which is the least there is
    np.testing.assert_allclose(white.tail, white.output_error, rtol=0.05)


def test_whitening_is_the_best_factoring_for_its_moment():
    """No step away from it has a smaller error; plain weights' factors do."""
    w_EDF = random_experts()
    moment_DD, root_DD = anisotropic()
    b_GDZ, a_EZF, [error] = factor(w_EDF, moment_DD, latent=F)
    s = np.linalg.svd(np.hstack(list(root_DD.T @ w_EDF)), compute_uv=False)
    best = np.linalg.norm(s[F:]) / np.linalg.norm(s)
    assert best <= error.output_error < 1.02 * best  # above it by the ridge alone


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_whitening_by_the_identity_changes_nothing(scale):
    w_EDF = random_experts()
    plain = factor(w_EDF, latent=F)
    white = factor(w_EDF, scale * np.eye(D), latent=F)
    expected, found = (product(b, a, GROUP) for b, a, _ in (plain, white))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert white[2][0].output_error == pytest.approx(plain[2][0].error)


def test_whitening_with_fewer_inputs_than_dims():
    w_EDF = random_experts()
    x_TD = np.random.default_rng(5).normal(size=(5, D))
    b_GDZ, a_EZF, [error] = factor(w_EDF, x_TD.T @ x_TD / 5, latent=F)
    assert np.isfinite(b_GDZ).all()
    assert np.isfinite(a_EZF).all()
    assert error.output_error < 1e-3  # 5 directions fit in a space of 8
    _, _, [nothing] = factor(w_EDF, np.zeros((D, D)), latent=F)
    assert nothing.error == factor(w_EDF, latent=F)[2][0].error

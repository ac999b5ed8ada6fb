"""Verdicts on mixtures of latent experts (MoLE, arXiv:2503.23100)."""

from moex.experiment.claims import larger, smaller, true


def groups(results):
    """The groups of experts that were converted, ascending."""
    names = [name for name in results.arms if name.removeprefix("to_").isdecimal()]
    return sorted(int(name.removeprefix("to_")) for name in names)


def errors_are_the_tail(results):
    """The error of converted weights is the tail of their singular values."""
    worst = max(results.mean(f"to_{group}", "tail").mean for group in groups(results))
    return true(worst < 1e-5, f"off by at most {worst:.1e}")


def loss_grows_with_the_group(results):
    """Before tuning, the loss grows with the number of experts in a group."""
    means = [results.mean(f"to_{g}", "converted").mean for g in groups(results)]
    return true(means == sorted(means), ", ".join(f"{mean:.4f}" for mean in means))


def phase_1_never_helps_the_weights(results):
    """Cutting experts to a lower rank first makes the error of weights no smaller."""
    middle = groups(results)[1]
    return larger(results.difference(f"to_{middle}_rank", f"to_{middle}", "error"))


def as_good_as_plain(results):
    """Trained with two thirds of the parameters, the loss is within 2 % of plain."""
    middle = groups(results)[1]
    found = results.ratio(f"latent_{middle}", "plain", "nll")
    numbers = f"{found.mean:.4f} ± {found.half_width or 0:.4f}"
    return true(found.mean + (found.half_width or 0) <= 1.02, numbers)


def recovered(results):
    """Converted and tuned, the loss is within 3 % of the plain model's."""
    last = groups(results)[-1]
    found = results.ratio(f"to_{last}", "plain", "nll")
    numbers = f"{found.mean:.4f} ± {found.half_width or 0:.4f}, groups of {last}"
    return true(found.mean + (found.half_width or 0) <= 1.03, numbers)


def converting_equals_training(results):
    """Converted and tuned, it ends within 2 % of latent experts from the start."""
    middle = groups(results)[1]
    found = results.ratio(f"to_{middle}", f"latent_{middle}", "nll")
    numbers = f"{found.mean:.4f} ± {found.half_width or 0:.4f}"
    return true(found.mean + (found.half_width or 0) <= 1.02, numbers)


def whitening_helps(results):
    """Whitening lowers the loss of a conversion before tuning (our extension)."""
    middle = groups(results)[1]
    names = f"to_{middle}_whitened", f"to_{middle}"
    return smaller(results.difference(*names, "converted"), form="{:+.4f}")


def fewer_bytes_on_the_way(results):
    """Latent experts move fewer bytes between devices than plain ones."""
    middle = groups(results)[1]
    ratio = results.ratio(f"bytes_latent_{middle}", "bytes_plain", "bytes").mean
    narrow = results.ratio("bytes_narrow", "bytes_plain", "bytes").mean
    return true(ratio < 1, f"{ratio:.2f} of the bytes; the narrow layer {narrow:.2f}")


MECHANISMS = (
    errors_are_the_tail,
    loss_grows_with_the_group,
    phase_1_never_helps_the_weights,
)
CLAIMS = (
    as_good_as_plain,
    recovered,
    converting_equals_training,
    whitening_helps,
    fewer_bytes_on_the_way,
)

"""All tolerances of the tests outside of tests/kernels; loosening one needs a reason.

Each entry is (rtol, atol). Values in these tests are of order 1 unless scaled so.
"""

import numpy as np

TOLERANCE = {
    # One layer in float32 against a float64 loop: sums of at most some hundred terms.
    "float32": (2e-5, 2e-5),
    # bfloat16 rounds by 2**-8 at every intermediate result.
    "bfloat16": (4e-2, 4e-2),
    # The same float32 program compiled twice, with sums in another order.
    "order": (1e-5, 2e-6),
    # A whole training step in another order of sums: a few layers deep, both ways.
    "step": (1e-4, 1e-5),
    # Gradients against central differences of a float64 function.
    "difference": (1e-4, 1e-4),
}


def assert_close(actual, expected, kind, message=""):
    rtol, atol = TOLERANCE[kind]
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        rtol=rtol,
        atol=atol,
        err_msg=message,
    )

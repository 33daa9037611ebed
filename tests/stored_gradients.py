"""Gradients against those that the parity oracle stores."""

import numpy as np


def gradient_errors(oracle, grads):
    """Relative L2 difference of every stored gradient, over its stored entries: parameter name -> error."""
    errors = {}
    for key in oracle:
        if key.startswith("grad.") and key.endswith("@value"):
            name = key.removeprefix("grad.").removesuffix("@value")
            found = grads[name].ravel()[oracle[f"grad.{name}@index"]]
            errors[name] = float(np.linalg.norm(found - oracle[key]) / np.linalg.norm(oracle[key]))
    return errors

from dtr_kernels import reference


def _mask(w):
    return None if w is None else w.mask()


def routed_linear(x, shift, scale, weight, bias, window=None, branch=None, gate=None, eps=1e-6):
    return reference.routed_linear(x, branch, gate, shift, scale, weight, bias, _mask(window), eps)


def routed_mlp(
    x,
    shift,
    scale,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    window=None,
    branch=None,
    gate=None,
    keep_branch=False,
    eps=1e-6,
):
    return reference.routed_mlp(
        x, branch, gate, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias, _mask(window), keep_branch, eps
    )


gated_residual = reference.gated_residual

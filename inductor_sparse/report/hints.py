"""What a user can do about each reason for which a site stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from inductor_sparse import profitability
from inductor_sparse.decisions import Decision, Reason, Tier

HINTS: dict[Reason, str] = {
    Reason.ACTIVATION_NOT_SPARSE: (
        "this activation has no exact zeros to skip; ReLU, ReLU² and gated ReLU do"
    ),
    Reason.CLIPPED_ACTIVATION: (
        "an activation clipped from above is not rewritten; use a plain ReLU or ReLU²"
    ),
    Reason.EXPONENT_NOT_TWO: (
        "only relu(x) and relu(x) ** 2 are known; other powers stay dense"
    ),
    Reason.SYMBOLIC_EXPONENT: (
        "the exponent is not a constant; write relu(x) ** 2 or relu(x).square()"
    ),
    Reason.NOT_ZERO_PRESERVING: (
        "something between the activation and the matmul turns zeros into other "
        "numbers, e.g. an added constant or a norm with a bias; move it elsewhere"
    ),
    Reason.UNSUPPORTED_DTYPE: (
        "use float32, bfloat16 or float16, e.g. model.to(torch.float32)"
    ),
    Reason.UNSUPPORTED_SHAPE: (
        "the shapes of this matmul are outside what the ops define; see the detail"
    ),
    Reason.WEIGHT_NOT_STATIC: (
        "the weight is not row-contiguous and cannot be copied; make it a parameter or "
        "a buffer, allow sparse.weight_copies, or call inductor_sparse.prepare(model)"
    ),
    Reason.WEIGHT_UNTRACKED: (
        "changes of this weight cannot be seen; load the model outside "
        "torch.inference_mode(), and leave weights that are to be skipped unsharded"
    ),
    Reason.TRAINING_GRAPH: (
        "this site is rewritten in inference only; run it under torch.no_grad()"
    ),
    Reason.HIGHER_ORDER_OP: (
        "the FFN is inside torch.cond or another higher-order operator; move it outside"
    ),
    Reason.NO_KERNEL_YET: (
        "there is no kernel for this device and dtype, or a package that compiles it "
        "is missing; see the detail"
    ),
    Reason.ARCH_UNSUPPORTED: (
        "there is no kernel for this architecture of GPU; nothing needs to be done"
    ),
    Reason.KERNEL_UNVERIFIED: (
        "the kernel has never run on this GPU architecture; set "
        "sparse.allow_unverified to use it"
    ),
    Reason.NOT_PROFITABLE: (
        "a sparse kernel would not be faster at these sizes; nothing needs to be done"
    ),
    Reason.TOO_DENSE: (
        "too many non-zeros, or too much energy that 2:4 would drop, were measured; "
        "raise sparse.max_density only if the benchmark of your shapes says that it "
        "pays, sparse.max_dropped_energy only if the model tolerates it"
    ),
    Reason.RULE_DISABLED: "the rule is named in sparse.disabled_rules; remove it there",
}
"""One remedy for each reason."""


_CALIBRATE = (
    "{count} applied site{plural} had too many non-zeros in these inputs for a gain to "
    "be predicted; random weights have about 50 %, trained ReLU² models 2 to 10 %. A "
    "plan made by inductor_sparse.calibrate() on your data leaves a site dense if "
    "skipping would be slower"
)


def hint(decisions: Sequence[Decision]) -> str:
    """One remedy: for the most common reason, else for sites too dense to gain.

    Of equally common reasons the one met first wins; ``""`` if there is nothing to say.
    """
    reasons = Counter(d.reason for d in decisions if d.reason is not None)
    if reasons:
        reason, _ = reasons.most_common(1)[0]
        return f"{reason.value}: {HINTS[reason]}"
    count = sum(_is_too_dense(decision) for decision in decisions)
    plural = "" if count == 1 else "s"
    return _CALIBRATE.format(count=count, plural=plural) if count else ""


def _is_too_dense(decision: Decision) -> bool:
    """Whether an applied site loses time by its density.

    The gain of 2:4 does not depend on that: it is below one where the format was asked
    for at a size at which it does not pay.
    """
    gain, density = decision.expected_gain, decision.density
    if gain is None or gain > 1.0 or decision.tier is Tier.APPROXIMATE:
        return False
    if density is None or decision.device != "cpu":
        return True
    # Where a plan would leave the site as it is there is nothing to advise.
    tokens = decision.shapes["M"]
    known = tokens if isinstance(tokens, int) else None
    return density > profitability.break_even_density(known, decision.dtype)

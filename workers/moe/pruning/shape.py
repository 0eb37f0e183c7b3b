"""How much is left: the arithmetic of pruning, before any weight is looked at.

A plan, a record and a pruned checkpoint must agree on the dimensions, so they all ask here.
What goes is rounded down: a ratio never removes more than it says (12.5 % of 60 experts are
7), and one that removes nothing is refused rather than measured as if it were pruned.
"""

from __future__ import annotations

import math

from workers.contract.errors import Infeasible
from workers.contract.model import Prune
from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Experts

_NUM_GROUPS, _TAKEN_GROUPS = "n_group", "topk_group"
_ROUNDING = 1e-9
"""0.29 of 100 is 28.999999999999996 in binary."""


def remaining(a: Architecture, prune: Prune) -> int:
    """Experts per layer (`inter`) or width of an expert (`intra`) that pruning leaves.

    Raises:
        Infeasible: with the arithmetic that does not come out.
    """
    moe = a.moe
    if moe is None:
        raise Infeasible(f"{a.family} has no experts to prune")
    of_layers = [layer.experts for layer in a.layers if layer.experts]
    if any((one.num, one.width) != (moe.num, moe.width) for one in of_layers):
        raise Infeasible(f"layers of {a.family} differ in their experts: one ratio has no meaning")
    if prune.kind == "intra" and prune.criterion == "frequency":
        raise Infeasible(
            "criterion frequency ranks experts, which kind intra keeps; "
            "channels are ranked by norm, reconstruction or random"
        )
    before, what = (
        (moe.num, "experts") if prune.kind == "inter" else (moe.width, "channels of an expert")
    )
    gone = math.floor(before * prune.ratio + _ROUNDING)
    if gone == 0:
        raise Infeasible(
            f"{prune.ratio:.1%} of {before} {what} is {before * prune.ratio:.3g}: nothing to remove"
        )
    left = before - gone
    if prune.kind == "inter":
        _choosable(a, moe, left, f"pruning {prune.ratio:.1%} of {before} leaves")
    return left


def groups(a: Architecture) -> int:
    """Groups that the experts of a layer are chosen by (DeepSeek); 1 where there are none."""
    text = Fields(a.config).language
    if a.family == "deepseek_v2" and text.word("topk_method", "greedy") == "greedy":
        return 1  # the number is there, and nothing looks at it
    return text.maybe(_NUM_GROUPS) or 1


def shared_width(moe: Experts) -> int:
    """FFN width of all shared experts together; 0 without."""
    return next((w.shape[0] for w in moe.shared_weights if w.cut == "out"), 0)


def _choosable(a: Architecture, moe: Experts, left: int, by: str) -> None:
    """Raises Infeasible unless top-k can be chosen from `left` experts, group by group."""
    if moe.top_k > left:
        raise Infeasible(f"top_k {moe.top_k} is above the {left} experts that {by}")
    number = groups(a)
    if number == 1:
        return
    if left % number:
        raise Infeasible(
            f"{left} experts, which {by}, are not divisible by the {number} groups of the router"
        )
    taken = Fields(a.config).language.maybe(_TAKEN_GROUPS) or number
    if taken * (left // number) < moe.top_k:
        raise Infeasible(
            f"the {left} experts that {by} are {left // number} in each of {number} groups, of "
            f"which a token takes {taken}: too few for top_k {moe.top_k}"
        )
    if left // number < 2:
        raise Infeasible(
            f"the {left} experts that {by} are 1 in each of {number} groups: nothing to choose"
        )

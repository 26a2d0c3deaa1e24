"""The methods that the paper compares and takes apart, a row each: what is changed before the first update, and which
weight set gets which K in which phase. starts.py does what a row says.

    METHODS["freeze-4-ffn"].start           # ("freeze", "first third", "feed-forward")

A new method is a new row. Without torch: an unknown method is told before that is imported.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A method. policies: what updates are scaled by, one of slowfast.METHODS, or {set: K} in P1 and
    in P2; start: what is changed before the first update, a function of starts.py and its arguments."""

    about: str
    policies: str | tuple = "df"
    start: tuple = ()


FIRST_THIRD = "first third"  # of the layers, 0-3 of 12, where S_II lies

METHODS = {
    "df": Row("directly fine-tune: K = 1"),
    "noisytune": Row("U(-0.075, 0.075) std(W) is added to each pre-trained W (Wu et al. 2022)", start=("noise", 0.15)),
    "fs": Row("fine-tuning slow, policies I and II", "fs"),
    "ff": Row("fine-tuning fast, policies III and IV", "ff"),
    "slowfast": Row("all four policies", "slowfast"),
    # Table 1
    "last-1": Row("only the last layer and the head are trained", start=("last", 1)),
    "last-2": Row("only the last two layers and the head are trained", start=("last", 2)),
    "last-3": Row("only the last three layers and the head are trained", start=("last", 3)),
    "freeze-4": Row("layers 0-3 do not train", start=("freeze", FIRST_THIRD)),
    "freeze-4-attention": Row("their attention does not train", start=("freeze", FIRST_THIRD, "attention")),
    "freeze-4-ffn": Row("their feed-forward does not train", start=("freeze", FIRST_THIRD, "feed-forward")),
    "enlarge-2": Row("K = 10 for the last two layers", ({"V_I": 10}, {"V_I": 10})),
    "enlarge-2-attention": Row("K = 10 for their attention", ({"V_II": 10}, {"V_II": 10})),
    "enlarge-2-ffn": Row("K = 10 for their feed-forward", ({"V_I_ffn": 10}, {"V_I_ffn": 10})),
    # Figure 3 (as many as XLM-R large has layers)
    **{f"freeze-layer-{i}": Row(f"layer {i} does not train", start=("freeze", i)) for i in range(24)},
    **{f"reinit-layer-{i}": Row(f"layer {i} starts anew", start=("reinit", i)) for i in range(24)},
    # Table 6
    "reinit-4": Row("layers 0-3 start anew", start=("reinit", FIRST_THIRD)),
    "reinit-4-attention": Row("their attention starts anew", start=("reinit", FIRST_THIRD, "attention")),
    "reinit-4-ffn": Row("their feed-forward starts anew", start=("reinit", FIRST_THIRD, "feed-forward")),
    # Table 8: the other pair of policies stays as in slowfast
    "only-S_I": Row("I and II on S_I", ({"S_I": "c1"}, {"S_I": "R", "V_II": "c2"})),
    "only-S_II": Row("I and II on S_II", ({"S_II": "c1"}, {"S_II": "R", "V_II": "c2"})),
    "swap-S": Row("I on S_II, II on S_I", ({"S_II": "c1"}, {"S_I": "R", "V_II": "c2"})),
    "only-V_I": Row("III and IV on V_I", ({"S_I": "c1"}, {"S_II": "R", "V_I": "c2"})),
    "only-V_II": Row("III and IV on V_II", ({"S_I": "c1", "V_I_ffn": "c1"}, {"S_II": "R", "V_II": "c2"})),
    "swap-V": Row("III on V_II, IV on V_I", ({"S_I": "c1", "V_I_ffn": "c1"}, {"S_II": "R", "V_I": "c2"})),
}

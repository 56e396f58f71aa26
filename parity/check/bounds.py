"""Every tolerance of the harness, with the measurement or argument behind it.

Three theses. float64 decides whether two programs are the same function, because there the
rounding of a correct port and the smallest bug are ten orders of magnitude apart. Narrower types
are judged by ratio: neither framework may err much more than the other, both against float64. And
a bound is argued for here, once; none is tuned to the error that a run happens to show.

"Measured" means on correct ports (the twins, GPT-2's 124 million parameters among them, and the
ports of the self-test) and on faults planted in them.
"""

import math

# ---- float32 against float32 -------------------------------------------------------------------

# The larger error against float64 over the smaller. Each framework sums in its own order and
# neither is more right: 1.5 was measured at worst. The rest is room for outputs of few numbers.
RATIO = 4.0

# ---- weights -----------------------------------------------------------------------------------

# A matrix applied by both frameworks in float64: one product per output, of at most a few thousand
# terms. Transposed by mistake it differs by about its own size.
ORIENTATION = 1e-12

# Two float32 tables of one formula, of the largest number: a few operations that each round. Where
# torch's can be had in float64, its own rounding times HELD_CONSTANTS is allowed if that is more,
# as for cosines of large angles.
TABLE = 4 * 2.0**-23

# ---- outputs -----------------------------------------------------------------------------------

# Of the largest output. Correct ports were measured at 4e-15 to 8e-14, the smallest planted bug at
# 3.7e-5. Rounding grows with width and depth, hence more for large models.
OUTPUT_FLOAT64, OUTPUT_FLOAT64_LARGE, LARGE_MODEL = 1e-12, 1e-11, 50_000_000
# Unit of the last place of float32, of the largest output.
FLOAT32_ROUNDING = 2.0**-23
# Error of float32 against float64, of the largest output: catches outputs so wrong in both
# frameworks that their ratio is 1.
OUTPUT_FLOAT32 = 1e-4
# Largest error of 16-bit logits, of the largest logit. bfloat16 rounds by up to 2**-9 of a number,
# and four roundings per block in either twin add up like a random walk:
# 2**-9 * sqrt(2 * 4 * 48) = 4e-2 for the 48 blocks of the deepest preset.
OUTPUT_FLOAT16 = 4e-2
# Rounding of a number of 16 bits.
EPSILON_FLOAT16 = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# Outputs that may differ after rounding to float32. Two float64 numbers that straddle a rounding
# edge of float32 become different float32 numbers; a gap of 1e-12 does that to one output of size 1
# in 60,000, and any run may have one by bad luck.
ROUNDED_APART, ROUNDED_APART_PER_OUTPUT = 1, 2e-5
# Reading a sequence in chunks through the cache must change nothing but the order of sums.
CACHE = {"float64": OUTPUT_FLOAT64, "float32": 1e-5}

# Where a model holds constants in float32, such as a table of angles, its float64 run may be off by
# what rounding did to them. Moving each by half a unit in its last place measures that; a table is
# the result of a few operations that each round, in either model. A constant that is wrong by one
# in a thousand is off by more than 1e4 such moves.
HELD_CONSTANTS = 8.0

# ---- gradients ---------------------------------------------------------------------------------

# Relative L2 per leaf. Correct ports were measured at 1.5e-15 to 1.6e-14 in float64 and at 9e-7 to
# 5e-6 in float32; the smallest gradient bug at 0.11.
GRADIENT = {"float64": 1e-12, "float32": 2e-5}
# Of the norm of the whole gradient, where a gradient is analytically zero: what is left is the
# rounding of the other terms, with room for long sums.
NULL_GRADIENT = {"float64": 1e-12, "float32": 1e-5}
# A gradient this far below the whole one counts as analytically zero: 1e4 units of float64's last
# place, or the rounding of float32 where the run is partly in that.
ZERO_GRADIENT, ZERO_GRADIENT_IMPURE = 1e-12, 1e-5

# ---- training ----------------------------------------------------------------------------------

# Gap of two losses. Correct ports were measured at 5e-15 over 1,000 steps in float64 and at 7e-6 in
# float32, without growth.
LOSS = {"float64": OUTPUT_FLOAT64, "float32": 2e-5}
# The same in bfloat16, which rounds by 2**-9 of a number: of a loss as large as ln 50257.
LOSS_BFLOAT16 = 2e-2
# Updates and moments, relative L2 per leaf in float64, take the bound of the outputs. An update is
# a difference of parameters about a thousand times its size, so its rounding is a thousand units of
# the last place, 2e-13. GPT-2 was measured at 4.5e-12, and at 3e-12 for the loss of step 4, which
# the bound of large models allows.
#
# Gap of a single update, in learning rates. In float64 AdamW's epsilon of 1e-8 swallows noise of
# 1e-16. In float32 it makes steps of up to one rate out of noise, so that null leaves, the only
# ones judged so there, may go either way and no further.
SINGLE_UPDATE = {"float64": 1e-4, "float32": 2.0}
# Gap of two final parameters in float64; rounding grows with the learning rate at every step.
PARAMETERS = 1e-11
# The same where the gradient is only rounding, in learning rates times steps: noise of 1e-16 of the
# whole gradient, divided by AdamW's epsilon of 1e-8, in the same direction every time.
NULL_PARAMETERS = 1e-8
# A gap of two trainings is a bug when it is this many times the gap of one twin to its own run from
# weights one rounding away (the perturbed run); up to there it may be chance.
CHANCE = 100.0
# Perturbed runs by which a value past its bound is judged, and how many units of the last place
# their weights are moved by. A float32 run rounds at every operation, not only once by weight; and
# where one unit of a million stands so near its kink that it flips in one run of twenty, runs that
# are moved by one unit would seldom show it. Of their largest gap RATIO is allowed, and CHANCE in
# training, which begins one unit away.
PERTURBED_RUNS, ROUNDINGS = 4, 16
# The same of outputs, which must show that a number jumps: enough that one at the edge of a step
# crosses it in one of them, but for one time in a hundred.
PERTURBED_OUTPUTS, OUTPUT_ROUNDINGS = 8, 4
# Rounding of a loss, which is float32 in every narrow type; no ratio can be taken of less.
LOSS_ROUNDING = 2.0**-23

# ---- tokens ------------------------------------------------------------------------------------

# Logit errors up to which a flipped token can be an accident: a fault must not widen its own
# excuse. 16-bit logits take OUTPUT_FLOAT16, of the largest logit.
LOGITS = {"float64": OUTPUT_FLOAT64_LARGE, "float32": OUTPUT_FLOAT32}
# Error of the noise of a draw, two logarithms in float32 that reach 17: two units of the last
# place.
DRAW = 4e-6

# ---- where and why -----------------------------------------------------------------------------

# A module's output, of its largest number: rounding is near 1e-15 and the smallest bug near 1e-5.
MODULE_OUTPUT = 1e-12
# A gradient that a module passes back, of its largest number: rounding through all layers is near
# 1e-14.
MODULE_GRADIENT = 1e-9
# A change explains a gradient when it leaves no more; a wrong one leaves a tenth.
EXPLAINED_GRADIENT = 1e-12
# A fit explains its targets when it leaves this many times their rounding. Right models leave less
# than one; the smallest wrong one, an epsilon of 1e-8 in the wrong place, leaves 1e5.
FIT_RESIDUAL = 16.0
# Two fitted numbers differ when they are this many times their errors apart.
FIT_APART = 100.0
# The form of an optimizer explains a side that leaves this many times its rounding; a wrong one
# leaves a thousand.
FORM_RESIDUAL = 30.0
# Of the model's gap, what a right change of one module may leave: other faults are no part of it.
GAP_LEFT = 1e-2
# Rounding that fits assume: of a gradient that is computed twice, of its norm (1.6e-14 was measured
# for GPT-2); of a second moment that first moments explain, of its norm (within four steps a square
# of theirs is up to 16 times as large, and 6e-15 was measured); of a weight within a step.
EPSILON = 2.0**-52
GRADIENT_ROUNDING, MOMENT_ROUNDING, WEIGHT_ROUNDING = 1e-13, 32 * EPSILON, 4 * EPSILON
# Of a move of running statistics, what a fit may leave: moves are differences, which cancel.
STATISTICS_RESIDUAL = 1e4 * GRADIENT_ROUNDING


def float64_bound(num_params: int) -> float:
    """Return the bound of outputs, updates and losses in float64 for a model of this size."""
    return OUTPUT_FLOAT64_LARGE if num_params > LARGE_MODEL else OUTPUT_FLOAT64


def rounded_apart(count: int) -> int:
    """Return how many of `count` float64 outputs may round to another float32 number."""
    return ROUNDED_APART + math.floor(ROUNDED_APART_PER_OUTPUT * count)

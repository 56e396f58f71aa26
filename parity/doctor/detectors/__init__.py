"""The detectors, in the order of a disciplined debugging session.

First what a model is before it has learned anything, then what it may see, then what it is scored
by and whether it learns, then how it decodes.
"""

from parity.doctor.detectors import decoding, forward, learning, reference
from parity.doctor.finding import Detector

DETECTORS = (
    Detector(
        "initial-loss",
        forward.initial_loss,
        "Is the loss of fresh weights near ln V?",
        "Anything else at the start is a wrong scale somewhere: the first hundreds of steps only "
        "undo it.",
        "Look at the standard deviations of the initial weights, embeddings first; a tied head "
        "with embeddings of deviation 1 gives logits of size sqrt(D).",
    ),
    Detector(
        "determinism",
        forward.determinism,
        "Does the same question get the same answer?",
        "No comparison means anything while answers change by themselves; and dropout that drops "
        "the same elements in every step trains a smaller model.",
        "Call eval() before evaluation and generation, pass `training=` on to functional dropout, "
        "and give every step a key of its own.",
    ),
    Detector(
        "causality",
        forward.causality,
        "Does changing a later token leave earlier logits alone?",
        "A model that sees what it is to predict trains to a loss near 0 and generates nonsense.",
        "Look at the mask: is it there, on the right side of the diagonal, applied before the "
        "softmax with a value that leaves exactly nothing, and is softmax over the keys?",
        after=("determinism",),
    ),
    Detector(
        "causality-gradient",
        forward.causality_gradient,
        "Do the logits at t depend on tokens 0 to t and on no other?",
        "A leak too soft to change a token is still a gradient to learn from; and a mask one too "
        "tight hides what a position may see.",
        "Compare the number of slots a query may see with t + 1.",
        needs=("reach",),
    ),
    Detector(
        "attention-rows",
        forward.attention_rows,
        "Do the weights of query t add up to one, over slots 0 to t?",
        "A mask applied after the softmax takes weight away from rows, and a mask broadcast along "
        "the wrong axis hits the wrong row.",
        "Mask scores and not weights; print the mask of a batch with two lengths.",
        needs=("attention",),
    ),
    Detector(
        "attention-scale",
        forward.attention_scale,
        "Do queries and keys of size one give scores of size one?",
        "Scores too large make attention a choice of one token before anything is learned; too "
        "small, a mean over all.",
        "Divide by the root of the head dimension, not of the model's width, unless another scale "
        "is meant.",
        needs=("attention",),
        after=("causality", "attention-rows"),
    ),
    Detector(
        "residual-stream",
        forward.residual_stream,
        "Do fresh blocks add to the stream and leave it in place?",
        "Without the identity path a gradient must pass through every block, and depth stops "
        "helping.",
        "x + sublayer(norm(x)), in both halves of a block.",
    ),
    Detector(
        "position-sensitivity",
        forward.position_sensitivity,
        "Does it matter where a token stands, and not too much?",
        "Without positions a sentence is a bag of words; with positions drawn too large the token "
        "itself is drowned.",
        "Is the table added, indexed by time and not by row, drawn with the deviation of the "
        "token embedding?",
        after=("determinism",),
    ),
    Detector(
        "batch-independence",
        forward.batch_independence,
        "Does a row come out the same alone and in a batch?",
        "Rows that mix make results depend on what else was asked at the same time.",
        "Look for a view where a transpose was meant, a norm over the wrong axis, a loss that "
        "shifts after flattening.",
        after=("determinism",),
    ),
    Detector(
        "padding-invariance",
        forward.padding_invariance,
        "Does padding change nothing?",
        "Rows of different lengths share a batch in every evaluation and every server.",
        "Is each row masked by its own length?",
        needs=("takes_counts",),
        after=("determinism", "causality"),
    ),
    Detector(
        "boundary-lengths",
        forward.boundary_lengths,
        "Do one token and a full context work, and one more not?",
        "An index one too far is read from somewhere else in silence, or is NaN.",
        "Check the first and the last row of the position table, and what a full cache does with "
        "one token more.",
        after=("determinism", "causality"),
    ),
    Detector(
        "token-accounting",
        learning.token_accounting,
        "Is every real label scored once, and divided by their number?",
        "A wrong count changes perplexity and the learning rate, and padding in the loss teaches "
        "padding.",
        "Score labels at t + 1 inside each row, leave out padding and ignored labels, divide a sum "
        "over all batches by all of their tokens.",
    ),
    Detector(
        "gradient-coverage",
        learning.gradient_coverage,
        "Does every parameter get a gradient?",
        "A parameter without one is not part of the model: a typo uses another in its place, or it "
        "is detached.",
        "Look where that parameter is used; compare with the line above and below.",
        needs=("gradients",),
    ),
    Detector(
        "best-lag",
        learning.best_lag,
        "Which token do the trained logits name: the next?",
        "A missing shift learns to copy and its loss falls to 0 at once; a double shift skips "
        "every second token.",
        "Shift in one place: logits[:, :-1] against labels[:, 1:].",
        needs=("trainer",),
    ),
    Detector(
        "overfit-one-batch",
        learning.overfit_one_batch,
        "Can one small batch be learned by heart?",
        "What cannot learn four rows will not learn a corpus; nothing is worth tuning before.",
        "Check in this order: the shift, a softmax in front of the cross entropy, what is detached "
        "or frozen; in a training step of your own backward, step, zero_grad and the sign.",
        needs=("trainer",),
    ),
    Detector(
        "update-equals-reference",
        learning.update_equals_reference,
        "Is a training step AdamW, to rounding?",
        "Wrong decay, betas, clipping or schedules train almost as well, and never the same.",
        "The step that is named first tells: step 1 moments and decay, step 2 stale gradients and "
        "betas, later ones the schedule.",
        needs=("reference_trainer", "gradients"),
    ),
    Detector(
        "nan-origin",
        learning.nan_origin,
        "Do large scores and missing gradients stay finite?",
        "NaN spreads to every weight in one step, so only the first place tells anything.",
        "Subtract the maximum before exp; add epsilon outside of the root.",
        needs=("trainer", "gradients"),
    ),
    Detector(
        "dtype-audit",
        forward.dtype_audit,
        "Are the logits of every type those of float64?",
        "A mask value that is a number in float32 is infinity in float16, and infinity times zero "
        "is NaN.",
        "Take the lowest number of the type at hand, and compute the softmax in float32.",
        needs=("cast",),
    ),
    Detector(
        "cached-equals-uncached",
        decoding.cached_equals_uncached,
        "Does the cache change nothing, however the calls are cut?",
        "A cache that is off by one reads well for five tokens and is lost after eighty.",
        "The first token that differs tells: 0 the mask of a prompt, the first after a prompt the "
        "position or the slot, only ragged rows a length shared by all.",
        needs=("decoder",),
        after=("determinism", "causality"),
    ),
    Detector(
        "growing-graph",
        decoding.growing_graph,
        "Is a cache free of an autograd graph?",
        "Every step then keeps all steps before it, until memory ends.",
        "Decode under torch.no_grad() or inference_mode().",
        needs=("keeps_graph",),
    ),
    Detector(
        "recompilation",
        decoding.recompilation,
        "Do prompts of nearly the same length share a program?",
        "Compiling takes a thousand times as long as a token.",
        "Round lengths up, and pass positions as arrays and not as Python numbers.",
        needs=("num_programs",),
    ),
    Detector(
        "sampling",
        decoding.sampling,
        "Are greedy tokens the likeliest, draws random, stops stops?",
        "Text hides all of it: a key used twice repeats words, a stop that is missed goes on.",
        "A new key for every token, logits divided by the temperature, the stop compared with the "
        "token just written.",
        needs=("generate",),
        after=("determinism",),
    ),
    Detector(
        "parity",
        reference.parity,
        "Does the model do what its reference does?",
        "Some bugs make another model in which no question finds a fault: only a reference tells "
        "them apart.",
        "`parity check` says in which module the two part.",
        needs=("reference",),
    ),
)

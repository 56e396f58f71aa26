"""The bugs of the exercise as data: several of every category, each in both frameworks.

A stage is a part of the starter whose behaviour the grader watches on its own. A bug changes what
one stage does, in both frameworks the same way, and its texts hide nothing from who reads them:
three hints from vague to clear, and the answer.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from parity.faults.edit import Edit, edited

FRAMEWORKS = "flax", "torch"
FILES = "model.py", "cache.py", "train.py", "generate.py"
STAGES = "initial weights", "forward pass", "loss", "training", "generation"

# What the bugs of a level are taken from: the interview's four, then more.
ORDER = (
    "labels", "positions", "mask", "typo", "optimization", "generation", "typo", "positions",
)  # fmt: skip
CATEGORIES = {
    "labels": "which token each prediction is compared with",
    "positions": "the position table: how it starts, learns and is used",
    "mask": "the causal mask",
    "typo": "a silent typo in the model: nothing crashes, and it even learns",
    "optimization": "the training loop",
    "generation": "choosing the next token",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plant:
    """One bug of the exercise.

    Attributes:
        id: short name, words joined by dashes.
        category: one of `CATEGORIES`.
        stage: one of `STAGES`, the one whose behaviour it changes.
        title: what is wrong, in one line.
        hints: three, from vague to clear.
        answer: why it is wrong, and what it does.
        flax: its places in the Flax starter.
        torch: its places in the PyTorch starter.
    """

    id: str
    category: str
    stage: str
    title: str
    hints: tuple[str, str, str]
    answer: str
    flax: tuple[Edit, ...]
    torch: tuple[Edit, ...]

    def edits(self, framework: str) -> tuple[Edit, ...]:
        """The places in the starter of that framework, flax or torch."""
        return {"flax": self.flax, "torch": self.torch}[framework]


def files(framework: str, edits: Sequence[Edit] = ()) -> dict[str, str]:
    """The Python files of a starter by name, with the edits in them; the right ones without.

    Raises:
        ValueError: when the text of an edit is not in its file exactly once.
    """
    folder = Path(__file__).parent / framework
    return {
        name: edited(name, (folder / name).read_text(encoding="utf-8"), edits) for name in FILES
    }


def planted(framework: str, plants: Sequence[Plant]) -> dict[str, str]:
    """The Python files of a starter with those bugs in them.

    Raises:
        ValueError: when two of them want the same lines.
    """
    return files(framework, [edit for plant in plants for edit in plant.edits(framework)])


def chosen(level: int, seed: int) -> tuple[Plant, ...]:
    """The bugs of an exercise, the same in both frameworks.

    Args:
        level: how many bugs, from 1 to 8; categories in the order of `ORDER`.
        seed: of the choice within each category.

    Raises:
        ValueError: for a level that there is not.
    """
    if not 1 <= level <= len(ORDER):
        raise ValueError(
            f"exercise: level {level}. A level is a number of bugs. Choose one from 1 to "
            f"{len(ORDER)}."
        )
    taken: list[Plant] = []
    for number, category in enumerate(ORDER[:level]):
        # A string is hashed the same way in every process, and a lower level is a higher one's
        # beginning.
        order = random.Random(f"{seed}.{number}.{category}")
        of_category = [plant for plant in PLANTS if plant.category == category]
        candidates = order.sample(of_category, len(of_category))
        taken.append(next(plant for plant in candidates if fits(plant, taken)))
    return tuple(taken)


def fits(plant: Plant, others: Sequence[Plant]) -> bool:
    """Whether a bug can stand beside others: its lines are not theirs, in either framework."""
    if plant in others:
        return False
    try:
        for framework in FRAMEWORKS:
            planted(framework, [*others, plant])
            planted(framework, [plant, *others])
    except ValueError:
        return False
    return True


def subsets(plants: Sequence[Plant]) -> Iterator[tuple[Plant, ...]]:
    """All choices of some of them, none first."""
    for size in range(len(plants) + 1):
        yield from itertools.combinations(plants, size)


def _model(right: str, wrong: str) -> tuple[Edit, ...]:
    return (Edit("model.py", right, wrong),)


def _train(right: str, wrong: str) -> tuple[Edit, ...]:
    return (Edit("train.py", right, wrong),)


def _generate(right: str, wrong: str) -> tuple[Edit, ...]:
    return (Edit("generate.py", right, wrong),)


# The lines that many bugs are about, as they stand in the starters.

_SHIFT = "scores_BTV, targets_BT = logits_BTV[:, :-1], tokens_BT[:, 1:]"
_TABLE = (
    "table(\n            config.context_length, config.embed_dim, config.init_std, rng\n        )"
)
_FLAX_POSITIONS = "positions_T = jnp.arange(tokens_BT.shape[1])"
_TORCH_POSITIONS = "positions_T = torch.arange(tokens_BT.shape[1])"
_LOOK_UP = "self.position_embedding(positions_T)"
_SUM = f"self.token_embedding(tokens_BT) + {_LOOK_UP}"
_VISIBLE = "visible_TS = slots_S <= times_T1"
_FLAX_TIMES = "        times_T1, slots_S = jnp.arange(T)[:, None], jnp.arange(S)\n"
_TORCH_TIMES = "        times_T1, slots_S = torch.arange(T)[:, None], torch.arange(S)\n"
_FLAX_LOWEST = "        lowest = jnp.finfo(scores_BNTS.dtype).min\n"
_TORCH_LOWEST = "        lowest = torch.finfo(scores_BNTS.dtype).min\n"
_FLAX_MASKED = "        scores_BNTS = jnp.where(visible_TS, scores_BNTS, lowest)\n"
_TORCH_MASKED = "        scores_BNTS = scores_BNTS.masked_fill(~visible_TS, lowest)\n"
_FLAX_SOFTMAX = "        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)\n"
_TORCH_SOFTMAX = "        weights_BNTS = scores_BNTS.softmax(dim=-1)\n"
_SHAPE = "        T, S = scores_BNTS.shape[2:]\n"
_SCALE = " / q_BNTH.shape[-1] ** 0.5"
_READ_ATTENTION = "x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))"
_READ_MLP = "x_BTD = x_BTD + self.mlp(self.norm_2(x_BTD))"
_WINDOW = "tokens_BG[:, -model.config.context_length :]"
_FLAX_WINDOW = "tokens_BG[:, -context_length:]"


LABELS = (
    Plant(
        id="labels-not-shifted",
        category="labels",
        stage="loss",
        title="each position is asked for the token that it has just read",
        hints=(
            "The loss falls. Is what falls the thing that you want?",
            "After training, print the most likely token at each position beside what it read.",
            "In next_token_loss: position t has read token t. Which token should it predict?",
        ),
        answer="Scores and targets must be one apart: the scores at t are for token t + 1. Without "
        "a shift the model learns to copy, the loss goes to zero at once, and generation repeats "
        "the last token.",
        flax=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV, tokens_BT"),
        torch=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV, tokens_BT"),
    ),
    Plant(
        id="labels-shifted-twice",
        category="labels",
        stage="loss",
        title="each position is asked for the token after the next",
        hints=(
            "The loss falls. Is what falls the thing that you want?",
            "After training, compare the model's best guess at each position with the text: how "
            "far ahead does it read?",
            "In next_token_loss: count by how many places scores and targets are apart.",
        ),
        answer="The shift is two instead of one, so the model learns to skip a token and "
        "generation writes every second one.",
        flax=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV[:, :-2], tokens_BT[:, 2:]"),
        torch=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV[:, :-2], tokens_BT[:, 2:]"),
    ),
    Plant(
        id="labels-shifted-back",
        category="labels",
        stage="loss",
        title="each position is asked for the token before it",
        hints=(
            "The loss falls. Is what falls the thing that you want?",
            "After training, compare the model's best guess at each position with the text: does "
            "it look ahead or back?",
            "In next_token_loss: which of the two slices should lose its first column?",
        ),
        answer="Scores lose their first column and targets their last, so position t is scored on "
        "token t - 1, which it has seen: the model learns to look back.",
        flax=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV[:, 1:], tokens_BT[:, :-1]"),
        torch=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV[:, 1:], tokens_BT[:, :-1]"),
    ),
    Plant(
        id="labels-across-rows",
        category="labels",
        stage="loss",
        title="the last position of a row is asked for the first token of the next row",
        hints=(
            "The loss is nearly right: for one row alone it is right.",
            "Change the first token of row 1. Which predictions of row 0 should that change?",
            "In next_token_loss: flattening and shifting do not commute.",
        ),
        answer="Flattened first and shifted then, the rows are one long text: the end of each row "
        "is trained on the beginning of the next. Shift within rows, then flatten.",
        flax=_train(
            _SHIFT
            + "\n    return optax.softmax_cross_entropy_with_integer_labels(scores_BTV, targets_BT)"
            ".mean()",
            "scores_MV = logits_BTV.reshape(-1, logits_BTV.shape[-1])[:-1]\n"
            "    targets_M = tokens_BT.reshape(-1)[1:]\n"
            "    return optax.softmax_cross_entropy_with_integer_labels(scores_MV, targets_M)"
            ".mean()",
        ),
        torch=_train(
            _SHIFT + "\n    return F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten())",
            "scores_MV = logits_BTV.flatten(0, 1)[:-1]\n"
            "    targets_M = tokens_BT.flatten()[1:]\n"
            "    return F.cross_entropy(scores_MV, targets_M)",
        ),
    ),
    Plant(
        id="labels-wrap-around",
        category="labels",
        stage="loss",
        title="the last position of a row is asked for the first token of that row",
        hints=(
            "The loss is nearly right: all but one prediction of each row is scored as it should.",
            "How many targets does a row of T tokens have?",
            "In next_token_loss: what follows the last token?",
        ),
        answer="Rolled instead of sliced, the targets wrap around: nothing follows the last token, "
        "so its scores must be left out of the mean.",
        flax=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV, jnp.roll(tokens_BT, -1, axis=1)"),
        torch=_train(_SHIFT, "scores_BTV, targets_BT = logits_BTV, tokens_BT.roll(-1, dims=1)"),
    ),
)

_START_HINTS = (
    "Look at the model before its first step.",
    "Print the standard deviation of every parameter right after construction.",
    "Config says how all initial tables are drawn. One of them is not.",
)

POSITIONS = (
    Plant(
        id="positions-start-at-1",
        category="positions",
        stage="initial weights",
        title="the position table starts with a standard deviation of 1",
        hints=_START_HINTS,
        answer="Position vectors fifty times the size of token vectors drown the tokens: after the "
        "first norm all texts look alike, and learning is slow.",
        flax=_model(_TABLE, "table(config.context_length, config.embed_dim, 1.0, rng)"),
        torch=_model(_TABLE, "table(config.context_length, config.embed_dim, 1.0, rng)"),
    ),
    Plant(
        id="positions-start-at-0",
        category="positions",
        stage="initial weights",
        title="the position table starts at zero",
        hints=_START_HINTS,
        answer="With a table of zeros the model cannot tell one position from another at first; "
        "Config says that all tables start normal with init_std.",
        flax=_model(_TABLE, "table(config.context_length, config.embed_dim, 0.0, rng)"),
        torch=_model(_TABLE, "table(config.context_length, config.embed_dim, 0.0, rng)"),
    ),
    Plant(
        id="positions-start-wide",
        category="positions",
        stage="initial weights",
        title="the position table starts with a standard deviation of 1 / sqrt(embed_dim)",
        hints=_START_HINTS,
        answer="That is a rule for matrices that are multiplied with. A table is added, and beside "
        "tokens of init_std these positions are several times too loud.",
        flax=_model(
            _TABLE,
            "table(\n            config.context_length, config.embed_dim, config.embed_dim**-0.5, "
            "rng\n        )",
        ),
        torch=_model(
            _TABLE,
            "table(\n            config.context_length, config.embed_dim, config.embed_dim**-0.5, "
            "rng\n        )",
        ),
    ),
    Plant(
        id="positions-frozen",
        category="positions",
        stage="forward pass",
        title="the position table gets no gradient",
        hints=(
            "Does everything learn?",
            "Compare every parameter before and after training.",
            "Follow the gradient from the stream back to both tables.",
        ),
        answer="The gradient is cut between the table and the stream, so the position table stays "
        "as it was drawn.",
        flax=_model(_LOOK_UP, f"jax.lax.stop_gradient(\n            {_LOOK_UP}\n        )"),
        torch=_model(_LOOK_UP, f"{_LOOK_UP}.detach()"),
    ),
    Plant(
        id="positions-by-row",
        category="positions",
        stage="forward pass",
        title="the position of a token is the number of its row in the batch",
        hints=(
            "What does the model know of the order of tokens?",
            "Give the same row twice in one batch. Are the two outputs equal?",
            "In GPT: along which axis of the tokens do positions count?",
        ),
        answer="Positions count rows instead of columns: all tokens of a row share a position, and "
        "the same text gives another answer in another row.",
        flax=(
            Edit(
                "model.py",
                _FLAX_POSITIONS,
                "positions_B1 = jnp.arange(tokens_BT.shape[0])[:, None]",
            ),
            Edit("model.py", _LOOK_UP, "self.position_embedding(positions_B1)"),
        ),
        torch=(
            Edit(
                "model.py",
                _TORCH_POSITIONS,
                "positions_B1 = torch.arange(tokens_BT.shape[0])[:, None]",
            ),
            Edit("model.py", _LOOK_UP, "self.position_embedding(positions_B1)"),
        ),
    ),
    Plant(
        id="positions-all-first",
        category="positions",
        stage="forward pass",
        title="every token stands at position 0",
        hints=(
            "What does the model know of the order of tokens?",
            "Swap two early tokens. Should the scores behind the last token change?",
            "In GPT: print the positions that are looked up.",
        ),
        answer="All tokens get row 0 of the table, so the model reads a bag of tokens.",
        flax=_model(_FLAX_POSITIONS, "positions_T = jnp.zeros_like(tokens_BT[0])"),
        torch=_model(_TORCH_POSITIONS, "positions_T = torch.zeros_like(tokens_BT[0])"),
    ),
    Plant(
        id="positions-from-the-end",
        category="positions",
        stage="forward pass",
        title="positions are counted from the end of the text",
        hints=(
            "It trains well and writes badly. What is different when it writes?",
            "Read a text, then read it with one token more. Which scores change?",
            "In GPT: print the positions that are looked up for a row of three tokens.",
        ),
        answer="Counted from the end, every token moves when one is added: what was learned at "
        "full length is of no use on a shorter text, and a cache could never be right.",
        flax=_model(_FLAX_POSITIONS, "positions_T = jnp.arange(tokens_BT.shape[1])[::-1]"),
        torch=_model(_TORCH_POSITIONS, "positions_T = torch.arange(tokens_BT.shape[1]).flip(0)"),
    ),
    Plant(
        id="positions-unused",
        category="positions",
        stage="forward pass",
        title="the position table is never added",
        hints=(
            "What does the model know of the order of tokens?",
            "Swap two early tokens. Should the scores behind the last token change?",
            "Which parameters take part in a forward pass?",
        ),
        answer="The table exists and nobody reads it, so the model reads a bag of tokens.",
        flax=_model(
            f"        {_FLAX_POSITIONS}\n        x_BTD = {_SUM}\n",
            "        x_BTD = self.token_embedding(tokens_BT)\n",
        ),
        torch=_model(
            f"        {_TORCH_POSITIONS}\n        x_BTD = {_SUM}\n",
            "        x_BTD = self.token_embedding(tokens_BT)\n",
        ),
    ),
    Plant(
        id="positions-multiplied",
        category="positions",
        stage="forward pass",
        title="token and position vectors are multiplied",
        hints=(
            "Look at the stream as it enters the first block.",
            "How large are its numbers, and how large are those of either table?",
            "In GPT: how do a token and its position become one vector?",
        ),
        answer="The two are multiplied instead of added: numbers of 0.02 become 0.0004, and a "
        "token cannot be told from its position any more.",
        flax=_model(_SUM, f"self.token_embedding(tokens_BT) * {_LOOK_UP}"),
        torch=_model(_SUM, f"self.token_embedding(tokens_BT) * {_LOOK_UP}"),
    ),
)

_LEAK_HINTS = (
    "One sentence can be said by heart from its positions alone. Do not trust it: test the model.",
    "Change the last token of a row. Which scores change, and which should?",
)

MASKS = (
    Plant(
        id="mask-missing",
        category="mask",
        stage="forward pass",
        title="every token sees all others",
        hints=(*_LEAK_HINTS, "In Attention: where are tokens kept from seeing later ones?"),
        answer="Without a mask each token sees the one that it is to predict, and copies it. What "
        "is learned that way is of no use in generation, where that token is not there yet. One "
        "sentence hides it, because its positions are enough to know it by heart.",
        flax=_model(f"{_SHAPE}{_FLAX_TIMES}        {_VISIBLE}\n{_FLAX_LOWEST}{_FLAX_MASKED}", ""),
        torch=_model(
            f"{_SHAPE}{_TORCH_TIMES}        {_VISIBLE}\n{_TORCH_LOWEST}{_TORCH_MASKED}", ""
        ),
    ),
    Plant(
        id="mask-polarity",
        category="mask",
        stage="forward pass",
        title="the mask hides what should be seen, and shows what should be hidden",
        hints=(*_LEAK_HINTS, "In Attention: print the weights of one head. Which half is zero?"),
        answer="True means visible where the mask is made and hidden where it is used: each token "
        "sees later ones only, and the last one, which has none, sees all alike.",
        flax=_model(
            _FLAX_MASKED, "        scores_BNTS = jnp.where(visible_TS, lowest, scores_BNTS)\n"
        ),
        torch=_model(
            _TORCH_MASKED, "        scores_BNTS = scores_BNTS.masked_fill(visible_TS, lowest)\n"
        ),
    ),
    Plant(
        id="mask-upper",
        category="mask",
        stage="forward pass",
        title="each token sees itself and later ones",
        hints=(*_LEAK_HINTS, "In Attention: print the weights of one head. Which half is zero?"),
        answer="The wrong triangle is kept: time runs backwards.",
        flax=_model(_VISIBLE, "visible_TS = slots_S >= times_T1"),
        torch=_model(_VISIBLE, "visible_TS = slots_S >= times_T1"),
    ),
    Plant(
        id="mask-one-too-many",
        category="mask",
        stage="forward pass",
        title="each token also sees the next one",
        hints=(*_LEAK_HINTS, "In Attention: print the weights of one head. Count what row 0 sees."),
        answer="The diagonal is off by one: the one token that a position may not see, because it "
        "is the answer, is seen.",
        flax=_model(_VISIBLE, "visible_TS = slots_S <= times_T1 + 1"),
        torch=_model(_VISIBLE, "visible_TS = slots_S <= times_T1 + 1"),
    ),
    Plant(
        id="mask-not-itself",
        category="mask",
        stage="forward pass",
        title="no token sees itself",
        hints=(
            "What does the first token attend to?",
            "Print the weights of one head: rows should sum to 1 and be zero on one side.",
            "In Attention: is the diagonal visible?",
        ),
        answer="The diagonal is off by one the other way. The first token is left with nothing to "
        "see, so all its scores are equally low and it sees everything alike.",
        flax=_model(_VISIBLE, "visible_TS = slots_S < times_T1"),
        torch=_model(_VISIBLE, "visible_TS = slots_S < times_T1"),
    ),
    Plant(
        id="mask-after-softmax",
        category="mask",
        stage="forward pass",
        title="the mask comes after the softmax",
        hints=(
            *_LEAK_HINTS[1:],
            "Print the weights of one head. What do its rows sum to?",
            "In Attention: what has the softmax already divided by when the mask comes?",
        ),
        answer="Zeroed after the softmax, later tokens are still in the denominator: rows do not "
        "sum to 1, and the future leaks through what is missing.",
        flax=_model(
            f"{_FLAX_LOWEST}{_FLAX_MASKED}{_FLAX_SOFTMAX}",
            f"{_FLAX_SOFTMAX}        weights_BNTS = jnp.where(visible_TS, weights_BNTS, 0.0)\n",
        ),
        torch=_model(
            f"{_TORCH_LOWEST}{_TORCH_MASKED}{_TORCH_SOFTMAX}",
            f"{_TORCH_SOFTMAX}        weights_BNTS = weights_BNTS.masked_fill(~visible_TS, 0.0)\n",
        ),
    ),
    Plant(
        id="mask-zero",
        category="mask",
        stage="forward pass",
        title="hidden scores become 0 instead of the lowest number",
        hints=(
            *_LEAK_HINTS,
            "In Attention: what weight does the softmax give to a score of 0?",
        ),
        answer="A score of 0 is a middling score, not a forbidden one: exp(0) is 1, and the future "
        "takes its share of the weights.",
        flax=_model(
            f"{_FLAX_LOWEST}{_FLAX_MASKED}",
            "        scores_BNTS = jnp.where(visible_TS, scores_BNTS, 0.0)\n",
        ),
        torch=_model(
            f"{_TORCH_LOWEST}{_TORCH_MASKED}",
            "        scores_BNTS = scores_BNTS.masked_fill(~visible_TS, 0.0)\n",
        ),
    ),
    Plant(
        id="mask-smallest",
        category="mask",
        stage="forward pass",
        title="hidden scores become the smallest positive number instead of the lowest",
        hints=(
            *_LEAK_HINTS,
            "In Attention: print the number that hidden scores get.",
        ),
        answer="finfo.tiny is the positive number next to 0; the lowest is finfo.min. To the "
        "softmax it is a score of 0, and the future takes its share of the weights.",
        flax=_model(_FLAX_LOWEST, _FLAX_LOWEST.replace(".min", ".tiny")),
        torch=_model(_TORCH_LOWEST, _TORCH_LOWEST.replace(".min", ".tiny")),
    ),
    Plant(
        id="mask-added",
        category="mask",
        stage="forward pass",
        title="the mask of True and False is added to the scores",
        hints=(
            *_LEAK_HINTS,
            "In Attention: what is a score plus True?",
        ),
        answer="An additive mask holds 0 and the lowest number. A bool one holds 1 and 0, so what "
        "is visible is merely preferred a little.",
        flax=_model(
            f"{_FLAX_LOWEST}{_FLAX_MASKED}", "        scores_BNTS = scores_BNTS + visible_TS\n"
        ),
        torch=_model(
            f"{_TORCH_LOWEST}{_TORCH_MASKED}", "        scores_BNTS = scores_BNTS + visible_TS\n"
        ),
    ),
)

_BLOCK_HINTS = (
    "Read one sublayer at a time, and draw where the stream goes.",
    "Compare Block with its own docstring.",
)

TYPOS = (
    Plant(
        id="typo-stream-normed",
        category="typo",
        stage="forward pass",
        title="attention is added to the normed stream instead of the stream",
        hints=(*_BLOCK_HINTS, "In Block: what is attention added to?"),
        answer="The residual path must go around the norm: y + f(norm(y)), not norm(y) + "
        "f(norm(y)). Otherwise each block forgets the size of what it was given.",
        flax=_model(
            _READ_ATTENTION,
            "x_BTD = self.norm_1(x_BTD)\n        x_BTD = x_BTD + self.attention(x_BTD)",
        ),
        torch=_model(
            _READ_ATTENTION,
            "x_BTD = self.norm_1(x_BTD)\n        x_BTD = x_BTD + self.attention(x_BTD)",
        ),
    ),
    Plant(
        id="typo-mlp-not-added",
        category="typo",
        stage="forward pass",
        title="the MLP replaces the stream instead of being added to it",
        hints=(*_BLOCK_HINTS, "In Block: where does the stream go at the MLP?"),
        answer="Without the residual path around the MLP all that came before must pass through "
        "it.",
        flax=_model(_READ_MLP, "x_BTD = self.mlp(self.norm_2(x_BTD))"),
        torch=_model(_READ_MLP, "x_BTD = self.mlp(self.norm_2(x_BTD))"),
    ),
    Plant(
        id="typo-norm-dropped",
        category="typo",
        stage="forward pass",
        title="the MLP reads the stream without its norm",
        hints=(*_BLOCK_HINTS, "Which parameters take part in a forward pass?"),
        answer="norm_2 exists and nobody calls it: the MLP reads the stream at whatever size it "
        "has.",
        flax=_model(_READ_MLP, "x_BTD = x_BTD + self.mlp(x_BTD)"),
        torch=_model(_READ_MLP, "x_BTD = x_BTD + self.mlp(x_BTD)"),
    ),
    Plant(
        id="typo-norm-twice",
        category="typo",
        stage="forward pass",
        title="the MLP reads through the norm of attention",
        hints=(*_BLOCK_HINTS, "Which parameters take part in a forward pass?"),
        answer="norm_1 is used twice and norm_2 never. At first both are the identity, so nothing "
        "shows until they have learned.",
        flax=_model(_READ_MLP, "x_BTD = x_BTD + self.mlp(self.norm_1(x_BTD))"),
        torch=_model(_READ_MLP, "x_BTD = x_BTD + self.mlp(self.norm_1(x_BTD))"),
    ),
    Plant(
        id="typo-query-for-key",
        category="typo",
        stage="forward pass",
        title="keys are made by the query's matrix",
        hints=(
            "Does everything learn?",
            "Which parameters take part in a forward pass?",
            "In Attention: four linear maps exist. Count those that are called.",
        ),
        answer="self.query is called twice and self.key never: scores become symmetric, and the "
        "key's matrix never learns.",
        flax=_model("self.split_heads(self.key(x_BTD))", "self.split_heads(self.query(x_BTD))"),
        torch=_model("self.split_heads(self.key(x_BTD))", "self.split_heads(self.query(x_BTD))"),
    ),
    Plant(
        id="typo-key-for-value",
        category="typo",
        stage="forward pass",
        title="values are made by the key's matrix",
        hints=(
            "Does everything learn?",
            "Which parameters take part in a forward pass?",
            "In Attention: four linear maps exist. Count those that are called.",
        ),
        answer="self.key is called twice and self.value never: what is found and what is read are "
        "the same, and the value's matrix never learns.",
        flax=_model("self.split_heads(self.value(x_BTD))", "self.split_heads(self.key(x_BTD))"),
        torch=_model("self.split_heads(self.value(x_BTD))", "self.split_heads(self.key(x_BTD))"),
    ),
    Plant(
        id="typo-scale-of-all-heads",
        category="typo",
        stage="forward pass",
        title="scores are divided by the root of embed_dim instead of that of a head",
        hints=(
            "It learns, only more slowly than it should.",
            "Compare attention with its formula, symbol by symbol.",
            "In Attention: how many numbers are summed in one score?",
        ),
        answer="A score is a sum over the numbers of one head, so it is that root which keeps its "
        "size. Divided by more, attention starts flatter than it should.",
        flax=_model(_SCALE, " / x_BTD.shape[-1] ** 0.5"),
        torch=_model(_SCALE, " / x_BTD.shape[-1] ** 0.5"),
    ),
    Plant(
        id="typo-scale-missing",
        category="typo",
        stage="forward pass",
        title="scores are not divided by the root of a head's size",
        hints=(
            "It learns, only less evenly than it should.",
            "Compare attention with its formula, symbol by symbol.",
            "In Attention: how does the size of a score depend on that of a head?",
        ),
        answer="A score is a sum over the numbers of one head and grows with their root. Without "
        "the division the softmax starts sharper than it should.",
        flax=_model(_SCALE, ""),
        torch=_model(_SCALE, ""),
    ),
    Plant(
        id="typo-out-dropped",
        category="typo",
        stage="forward pass",
        title="attention leaves out its last matrix",
        hints=(
            "Does everything learn?",
            "Which parameters take part in a forward pass?",
            "In Attention: four linear maps exist. Count those that are called.",
        ),
        answer="self.out exists and nobody calls it, so heads are never mixed.",
        flax=_model(
            "return self.out(self.join_heads(mixed_BNTH))", "return self.join_heads(mixed_BNTH)"
        ),
        torch=_model(
            "return self.out(self.join_heads(mixed_BNTH))", "return self.join_heads(mixed_BNTH)"
        ),
    ),
    Plant(
        id="typo-softmax-over-queries",
        category="typo",
        stage="forward pass",
        title="the softmax runs over those that look instead of what they see",
        hints=(
            "Something sums to 1. Is it the right thing?",
            "Print the weights of one head, with the sums of its rows and of its columns.",
            "In Attention: over which letter of BNTS is the softmax?",
        ),
        answer="Each token should share out its own attention, which is a sum over S. Over T, "
        "tokens compete for being looked at, and later ones change what earlier ones get.",
        flax=_model(_FLAX_SOFTMAX, _FLAX_SOFTMAX.replace("axis=-1", "axis=-2")),
        torch=_model(_TORCH_SOFTMAX, _TORCH_SOFTMAX.replace("dim=-1", "dim=-2")),
    ),
    Plant(
        id="typo-heads-split-by-reshape",
        category="typo",
        stage="forward pass",
        title="heads are split by a reshape that mixes time and channels",
        hints=(
            "The shapes are right. Are the numbers where the names say?",
            "Split the heads of an x that holds its own time index. What does one head hold?",
            "Compare split_heads with its docstring: a reshape never moves an axis.",
        ),
        answer="A reshape to (B, N, T, H) cuts the row-major numbers into pieces that are not "
        "heads: time and channels are mixed. Split the last axis first, then swap two axes.",
        flax=_model(
            "x_BTD.reshape(B, T, self.num_heads, D // self.num_heads).swapaxes(1, 2)",
            "x_BTD.reshape(B, self.num_heads, T, D // self.num_heads)",
        ),
        torch=_model(
            "x_BTD.reshape(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)",
            "x_BTD.reshape(B, self.num_heads, T, D // self.num_heads)",
        ),
    ),
    Plant(
        id="typo-heads-joined-by-reshape",
        category="typo",
        stage="forward pass",
        title="heads are joined by a reshape that mixes time and channels",
        hints=(
            "The shapes are right. Are the numbers where the names say?",
            "Split the heads of an x and join them again. Is it x?",
            "Compare join_heads with its docstring: a reshape never moves an axis.",
        ),
        answer="Without swapping time and heads back the reshape puts one head's times where "
        "another head's channels should be.",
        flax=_model("x_BNTH.swapaxes(1, 2).reshape(B, T, N * H)", "x_BNTH.reshape(B, T, N * H)"),
        torch=_model("x_BNTH.transpose(1, 2).reshape(B, T, N * H)", "x_BNTH.reshape(B, T, N * H)"),
    ),
    Plant(
        id="typo-final-norm-dropped",
        category="typo",
        stage="forward pass",
        title="logits are read from the stream without the last norm",
        hints=(
            "Does everything learn?",
            "Which parameters take part in a forward pass?",
            "In GPT: what happens between the last block and the logits?",
        ),
        answer="self.norm exists and nobody calls it: a pre-norm model needs a norm behind its "
        "last block, or logits grow with depth.",
        flax=_model("        x_BTD = self.norm(x_BTD)\n", ""),
        torch=_model("        x_BTD = self.norm(x_BTD)\n", ""),
    ),
    Plant(
        id="typo-linear-mlp",
        category="typo",
        stage="forward pass",
        title="the MLP has lost its GELU",
        hints=(
            "Everything learns, but less can be learned.",
            "Compare MLP with its own docstring.",
            "In MLP: what are two linear maps in a row?",
        ),
        answer="Two linear maps in a row are one linear map.",
        flax=_model("jax.nn.gelu(self.up(x_BTD), approximate=True)", "self.up(x_BTD)"),
        torch=(
            Edit("model.py", 'F.gelu(self.up(x_BTD), approximate="tanh")', "self.up(x_BTD)"),
            Edit("model.py", "from torch.nn import functional as F\n", ""),
        ),
    ),
    Plant(
        id="typo-one-block-for-all",
        category="typo",
        stage="forward pass",
        title="the first block is used in the place of all",
        hints=(
            "Does everything learn?",
            "Which parameters take part in a forward pass?",
            "In GPT: follow the stream from block to block.",
        ),
        answer="The loop runs over the blocks and calls the first one every time, so the others "
        "never learn.",
        flax=_model(
            "for block in self.blocks:\n            x_BTD = block(x_BTD)",
            "for _ in self.blocks:\n            x_BTD = self.blocks[0](x_BTD)",
        ),
        torch=_model(
            "for block in self.blocks:\n            x_BTD = block(x_BTD)",
            "for _ in self.blocks:\n            x_BTD = self.blocks[0](x_BTD)",
        ),
    ),
)

_FLAX_START = "    momentum = optimizer.init(parameters)\n"
_FLAX_UPDATE = "        updates, momentum = optimizer.update(gradients, momentum)\n"
_FLAX_APPLY = "        parameters = optax.apply_updates(parameters, updates)\n"
_SGD = "optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM)\n"

OPTIMIZATION = (
    Plant(
        id="training-gradients-pile-up",
        category="optimization",
        stage="training",
        title="the gradients of all steps are added up",
        hints=(
            "Look at the loss curve: is it as smooth as one batch should make it?",
            "Print the norm of the gradient that the optimizer is given.",
            "In train: of how many steps is that gradient?",
        ),
        answer="Each step must start from a gradient of zero. Old gradients that are kept act like "
        "momentum without decay, and the loss swings wider and wider.",
        flax=(
            Edit(
                "train.py",
                _FLAX_START,
                f"{_FLAX_START}    total = jax.tree.map(jnp.zeros_like, parameters)\n",
            ),
            Edit(
                "train.py",
                _FLAX_UPDATE,
                "        total = jax.tree.map(jnp.add, total, gradients)\n"
                "        updates, momentum = optimizer.update(total, momentum)\n",
            ),
        ),
        torch=_train("        optimizer.zero_grad()\n", ""),
    ),
    Plant(
        id="training-momentum-lost",
        category="optimization",
        stage="training",
        title="the optimizer starts anew in every step",
        hints=(
            "It learns, only more slowly than it should.",
            "Take two steps by hand, with MOMENTUM, and compare.",
            "In train: what does the optimizer remember from one step to the next?",
        ),
        answer="Momentum is what the optimizer carries from step to step. Thrown away each time, "
        "it is plain gradient descent, ten times slower here.",
        flax=_train(_FLAX_UPDATE, _FLAX_UPDATE.replace("updates, momentum", "updates, _")),
        torch=(
            Edit("train.py", f"    {_SGD}", ""),
            Edit(
                "train.py",
                "        optimizer.zero_grad()\n",
                f"        {_SGD}        optimizer.zero_grad()\n",
            ),
        ),
    ),
    Plant(
        id="training-uphill",
        category="optimization",
        stage="training",
        title="the weights move up the gradient",
        hints=(
            "Which way does the loss go?",
            "Take one step by hand, and compare.",
            "In train: follow the sign from the loss to the weights.",
        ),
        answer="The step has the wrong sign, so the loss grows.",
        flax=_train(
            _FLAX_APPLY,
            "        parameters = jax.tree.map(jnp.subtract, parameters, updates)\n",
        ),
        torch=_train("        loss.backward()\n", "        (-loss).backward()\n"),
    ),
    Plant(
        id="training-no-step",
        category="optimization",
        stage="training",
        title="the updates are never applied",
        hints=(
            "Does the loss change at all?",
            "Compare every parameter before and after training.",
            "In train: who writes the new weights?",
        ),
        answer="Gradients are computed and then nobody moves the weights.",
        flax=_train(_FLAX_APPLY, "        optax.apply_updates(parameters, updates)\n"),
        torch=_train("        optimizer.step()\n", ""),
    ),
)

GENERATION = (
    Plant(
        id="generation-first-column",
        category="generation",
        stage="generation",
        title="the next token is chosen by the scores behind the first token",
        hints=(
            "The loss is as low as it should be. What does the model write?",
            "Generate one token from a text that it knows by heart.",
            "In generate: at which position does the model score what comes next?",
        ),
        answer="Only the scores behind the last token are about the next one; those at column 0 "
        "say what comes second.",
        flax=_generate("logits_BTV[:, window_BT.shape[1] - 1]", "logits_BTV[:, 0]"),
        torch=_generate("logits_BTV[:, -1]", "logits_BTV[:, 0]"),
    ),
    Plant(
        id="generation-last-token-only",
        category="generation",
        stage="generation",
        title="the model is shown only the last token",
        hints=(
            "The loss is as low as it should be. What does the model write?",
            "What does the model read when it chooses the next token? Print it.",
            "In generate: what would a model without a memory need to see?",
        ),
        answer="Reading the last token alone is for a model that has a cache. Without one it has "
        "forgotten everything else.",
        flax=_generate(_FLAX_WINDOW, "tokens_BG[:, -1:]"),
        torch=_generate(_WINDOW, "tokens_BG[:, -1:]"),
    ),
    Plant(
        id="generation-first-window",
        category="generation",
        stage="generation",
        title="beyond the context the model is shown the beginning instead of the end",
        hints=(
            "Generate more tokens than the context is long.",
            "What does the model read when it chooses such a token? Print it.",
            "In generate: which end of a long text matters for what comes next?",
        ),
        answer="The window must hold the last tokens. With the first ones it stops moving as soon "
        "as it is full, and the same token is chosen for ever.",
        flax=_generate(_FLAX_WINDOW, "tokens_BG[:, :context_length]"),
        torch=_generate(_WINDOW, "tokens_BG[:, : model.config.context_length]"),
    ),
    Plant(
        id="generation-window-short",
        category="generation",
        stage="generation",
        title="the model is shown one token fewer than it can read",
        hints=(
            "Generate as many tokens as the context is long.",
            "What does the model read when it chooses the last of them? Count.",
            "In generate: the window is not what the docstring says.",
        ),
        answer="The window holds context_length - 1 tokens: the last position is never used.",
        flax=_generate(_FLAX_WINDOW, "tokens_BG[:, -context_length + 1 :]"),
        torch=_generate(_WINDOW, "tokens_BG[:, -model.config.context_length + 1 :]"),
    ),
    Plant(
        id="generation-chosen-unread",
        category="generation",
        stage="generation",
        title="the model is shown the given tokens only, never the chosen ones",
        hints=(
            "The loss is as low as it should be. What does the model write?",
            "What does the model read when it chooses the second token? Print it.",
            "In generate: two names differ in one letter.",
        ),
        answer="The window is cut from the given tokens instead of those with the chosen ones "
        "behind them, so the same token is chosen again and again.",
        flax=_generate(_FLAX_WINDOW, "np.asarray(tokens_BT)[:, -context_length:]"),
        torch=_generate(_WINDOW, _WINDOW.replace("tokens_BG", "tokens_BT")),
    ),
)

PLANTS = (*LABELS, *POSITIONS, *MASKS, *TYPOS, *OPTIMIZATION, *GENERATION)

_BY_HAND = (
    "Something that was right has been changed.",
    "Compare with the starter as it was written.",
    "Frameworks do not agree on the defaults of what you have changed.",
)
_NORMS = "= nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon)"

# Never planted: what a student may break on the way, so that it can be called by its name.
MISHAPS = (
    Plant(
        id="mishap-gelu",
        category="mishap",
        stage="forward pass",
        title="GELU in its exact form instead of the tanh form",
        hints=_BY_HAND,
        answer="torch computes the exact form unless told otherwise, jax the tanh form.",
        flax=_model("approximate=True", "approximate=False"),
        torch=_model('approximate="tanh"', 'approximate="none"'),
    ),
    Plant(
        id="mishap-epsilon",
        category="mishap",
        stage="forward pass",
        title="norms with an epsilon of 1e-6 instead of Config.norm_epsilon",
        hints=_BY_HAND,
        answer="nnx.LayerNorm has 1e-6 unless told otherwise, nn.LayerNorm 1e-5.",
        flax=_model("epsilon=config.norm_epsilon", "epsilon=1e-6"),
        torch=tuple(
            Edit(
                "model.py",
                f"self.{name} {_NORMS}",
                f"self.{name} = nn.LayerNorm(config.embed_dim, eps=1e-6)",
            )
            for name in ("norm_1", "norm_2", "norm")
        ),
    ),
    Plant(
        id="mishap-loss-summed",
        category="mishap",
        stage="loss",
        title="the loss is a sum over tokens instead of their mean",
        hints=_BY_HAND,
        answer="A sum grows with the batch, and so does its gradient.",
        flax=_train("targets_BT).mean()", "targets_BT).sum()"),
        torch=_train("targets_BT.flatten())", 'targets_BT.flatten(), reduction="sum")'),
    ),
)

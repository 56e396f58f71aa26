"""Infer the rules of two modules: from shapes, names, order and use, and by experiment.

Leaves are matched first, see `match.py`: what has the shape, the name, the place and the use of
another is most likely the same. Where that leaves a choice, the likeliest is tried: if the outputs
are equal in float64, it is right, or as good as what is right. If not, the other choices are tried
one after the other, and then exchanges of what has the same shape, even where names seemed clear,
see `exchange.py`. Where none makes the outputs equal, as with a fault elsewhere in the model, the
likeliest map stands, and the rules have a note that says what was not proven.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from flax import nnx

from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.uses import Uses
from parity.weights.compress import as_rule, compress
from parity.weights.exchange import is_against_names, moved, moves
from parity.weights.known_layers import flax_leaf, torch_leaf, torch_owner
from parity.weights.layouts import Link
from parity.weights.match import Matching, Pair, alias_of, exchanged, is_needed, match, orders_of
from parity.weights.names import information, likeness, template, words
from parity.weights.rules import Rule, Rules, as_line
from parity.weights.units import Unit, fits, units
from parity.weights.weight_map import TransplantError

# Relative to the largest output: gaps that rounding leaves, and those that a wrong map cannot have,
# for with one the outputs differ by their own size.
_SAME_OUTPUT, _NEAR_OUTPUT = 1e-9, 1e-4
# A map that leaves so much less of the gap of all others is right, and something else is wrong.
_MUCH_BETTER = 0.03
# Least difference in cost between two ways to lie that decides without a run.
_CLEAR = 0.5
# Longest search, in seconds and in forward passes; most ways to exchange units of one group.
_SECONDS, _MOST_TRIALS, _MOST_EXCHANGES = 20.0, 400, 24
# The same, in seconds, against what names say clearly.
_SECONDS_AGAINST_NAMES = 8.0
# Layers of torch that add two biases with nothing in between. In a GRU a gate lies between.
_TWO_BIASES = torch.nn.LSTM | torch.nn.RNN | torch.nn.LSTMCell | torch.nn.RNNCell


class Experiment(Protocol):
    """Runs of both models, to tell maps apart."""

    def uses(self) -> tuple[Uses | None, Uses | None]:
        """Return how torch and how flax use their leaves."""

    def gap(self, rules: Rules) -> float:
        """Return the difference of the outputs, relative to the largest, for weights so mapped."""

    def strangers(self, rules: Rules) -> int:
        """Return how many outputs of torch's modules no module of flax has, for such weights."""


class OpenRules(ValueError):
    """Leaves for which no counterpart was found.

    Attributes:
        partial: the rules of all others.
    """

    def __init__(self, problems: Sequence[str], partial: Rules):
        self.partial = partial
        super().__init__(
            f"rules auto: {'; '.join(problems)}. Every leaf needs a counterpart that holds the "
            "same numbers. Mend a model, or add lines such as these to a rules file:\n"
            f"{partial.to_toml()}"
        )


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is not clear, and the possible answers, the likeliest first.

    Attributes:
        places: of the pairs concerned.
        answers: these pairs, each time.
    """

    places: tuple[int, ...]
    answers: tuple[tuple[Pair, ...], ...]

    @property
    def is_open(self) -> bool:
        """Whether nothing but a run decides, or one that a person makes."""
        first, second = (answer[0] for answer in self.answers[:2])
        is_layout = first.torch == second.torch and first.flax == second.flax
        return not is_layout or second.fits[0].cost - first.fits[0].cost < _CLEAR


def infer_rules(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    experiment: Experiment | None = None,
    given: Rules | None = None,
) -> Rules:
    """Infer the weight map of two modules.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        experiment: runs of both; None where there is nothing to run the models on.
        given: rules of some leaves, which stand.

    Returns:
        Rules that map every leaf. What could not be proven is in their notes.

    Raises:
        OpenRules: for leaves without a counterpart; a ValueError.
        TransplantError: for given rules that do not fit; a ValueError.
    """
    return _Inference(torch_module, flax_module, experiment, given or Rules(())).rules()


class _Inference:
    """The state of one inference."""

    def __init__(
        self,
        torch_module: torch.nn.Module,
        flax_module: nnx.Module,
        experiment: Experiment | None,
        given: Rules,
    ):
        self._torch, self._flax = torch_leaves(torch_module), flax_leaves(flax_module)
        self._module, self._experiment, self._given = torch_module, experiment, given
        self._uses = experiment.uses() if experiment else (None, None)
        self._ties = tuple(dict.fromkeys((*given.ties, *_ties(torch_module))))
        self._flax_ties = list(given.flax_ties)
        self._sums = list(given.sums)
        self._ignored: list[str] = []
        self._flax_ignored: list[str] = []
        self._notes: list[str] = []
        aliases = {alias for alias, _ in (*self._ties, *given.sums)}
        self._links, self._open = self._of_given()
        taken = {x for link in (*self._links, *self._open) for x in (*link.torch, *link.flax)}
        ours = {
            name: leaf
            for name, leaf in self._torch.items()
            if name not in aliases and name not in taken and not given.is_ignored(name)
        }
        theirs = {
            name: leaf
            for name, leaf in sorted(
                self._flax.items(), key=lambda item: _definition(flax_module, item[0])
            )
            if name not in {x for x, _ in given.flax_ties}
            and name not in taken
            and not given.is_flax_ignored(name)
        }
        self._kinds = (
            {name: torch_leaf(torch_module, name) for name in self._torch},
            {name: flax_leaf(flax_module, name) for name in self._flax},
        )
        self._models = (
            units(ours, self._kinds[0], self._uses[0]),
            units(theirs, self._kinds[1], self._uses[1]),
        )

    def rules(self) -> Rules:
        """Return the rules."""
        found = match(*self._models, self._torch, self._flax)
        if any(map(is_needed, found.torch)):
            found = self._summed(found)
        place = {name: number for number, name in enumerate(self._torch)}
        order = sorted(range(len(found.pairs)), key=lambda i: place[found.pairs[i].torch.name])
        pairs = [found.pairs[i] for i in order] + [self._pair_of(link) for link in self._open]
        groups = [sorted(order.index(i) for i in group) for group in found.groups]
        problems = self._left_over(found)
        if problems:
            links = [*self._links, *(pair.fits[0].link(pair.torch, pair.flax) for pair in pairs)]
            partial = compress(links, self._base(), self._torch, self._flax)
            raise OpenRules(problems, dataclasses.replace(partial, rest="auto"))
        choices = list(self._choices(pairs, groups))
        return self._decided(pairs, choices)

    def _summed(self, found: Matching) -> Matching:
        """Return the match with one of the two biases of recurrent layers added to the other.

        Their sum alone matters, and flax's cells have one bias.
        """
        sums = [
            (name, name.replace("bias_ih", "bias_hh"))
            for unit in self._models[0]
            for name in unit.names
            if "bias_ih" in name and isinstance(torch_owner(self._module, name)[0], _TWO_BIASES)
        ]
        added = {term for term, _ in sums}
        ours = [unit for unit in self._models[0] if unit.name not in added]
        again = match(ours, self._models[1], self._torch, self._flax)
        if not sums or again.left >= found.left:
            return found
        self._sums += sums
        self._notes += [f"flax has the sum of torch {term} and {other}" for term, other in sums]
        return again

    def _base(self) -> Rules:
        """Return the rules without their rules."""
        given = self._given
        return Rules(
            (),
            self._ties,
            (*given.ignored, *self._ignored),
            tuple(self._flax_ties),
            (*given.flax_ignored, *self._flax_ignored),
            notes=tuple(self._notes),
            sums=tuple(self._sums),
        )

    def _rules_of(self, pairs: Sequence[Pair], short: bool = True) -> Rules:
        links = [*self._links, *(pair.fits[0].link(pair.torch, pair.flax) for pair in pairs)]
        if short:
            return compress(links, self._base(), self._torch, self._flax)
        return dataclasses.replace(self._base(), rules=tuple(map(as_rule, links)))

    def _of_given(self) -> tuple[list[Link], list[Link]]:
        """Return the links of the given rules: those with a layout, and those without."""
        links = [
            link
            for rule in self._given.rules
            for link in rule.links(self._torch, "torch", self._flax)
        ]
        problems = [
            f"rule {rule} matches nothing"
            for rule in self._given.rules
            if not rule.optional and not list(rule.links(self._torch, "torch", self._flax))
        ]
        problems += [
            f"{framework} leaf {name} of the rules does not exist"
            for link in links
            for framework, names, leaves in (
                ("torch", link.torch, self._torch),
                ("flax", link.flax, self._flax),
            )
            for name in names
            if name not in leaves
        ]
        if not problems:
            problems = [
                x for link in links if link.layout for x in link.misfits(self._torch, self._flax)
            ]
        if problems:
            raise TransplantError(problems)
        return [x for x in links if x.layout], [x for x in links if not x.layout]

    def _pair_of(self, link: Link) -> Pair:
        """Return the pair that a given link without a layout is."""
        sides = []
        for number, (names, leaves) in enumerate(
            ((link.torch, self._torch), (link.flax, self._flax))
        ):
            one = units({names[0]: leaves[names[0]]}, self._kinds[number], self._uses[number])[0]
            stacks = tuple(size for _, size in link.stacks) if len(names) > 1 else ()
            width = len(names) // math.prod(stacks)
            shapes = tuple(leaves[name].shape for name in names[:width])
            sides.append(dataclasses.replace(one, names=names, shapes=shapes, stacks=stacks))
        if not (found := fits(*sides)):
            shapes = " and ".join(str(list(unit.shapes[0])) for unit in sides)
            raise TransplantError(
                [f"torch leaf {link.torch[0]} does not lie in flax {link.flax[0]}: {shapes}"]
            )
        return Pair(sides[0], sides[1], 0.0, tuple(found))

    def _left_over(self, found: Matching) -> list[str]:
        """Ignore what is no weight, tie what is one; return what has no counterpart."""
        uses = self._uses
        problems = []
        for unit in found.torch:
            is_unused = bool(uses[0]) and not any(name in uses[0] for name in unit.names)
            if not is_needed(unit) or is_unused:
                self._ignored += unit.names
                if is_needed(unit):
                    self._notes.append(f"torch {unit.name}: no output needs it, and flax lacks it")
            else:
                problems.append(
                    _missing("torch", unit, found.flax) + self._added(unit, found.pairs)
                )
        owners: dict[str, str] = {}
        for unit in sorted(found.flax, key=lambda unit: -len(unit.shapes[0])):
            is_unused = uses[1] is not None and not any(name in uses[1] for name in unit.names)
            alias = None if is_unused else self._alias(unit, found.pairs, owners)
            if is_unused or (not is_needed(unit) and alias is None):
                self._flax_ignored += unit.names
                if is_needed(unit):
                    self._notes.append(f"flax {unit.name}: no output needs it, and torch lacks it")
            elif alias is not None and len(unit.names) == 1:
                owners[unit.owner] = alias.flax.owner
                self._flax_ties.append((unit.name, alias.flax.name))
                self._notes.append(
                    f"flax {unit.name} and {alias.flax.name} are one tensor in torch, "
                    f"{alias.torch.name}"
                )
            else:
                problems.append(_missing("flax", unit, found.torch))
        return problems

    def _added(self, unit: Unit, pairs: Sequence[Pair]) -> str:
        """Ask whether a bias without a counterpart is added to one that has one."""
        if unit.operation != "term":
            return ""
        if isinstance(torch_owner(self._module, unit.name)[0], torch.nn.GRU | torch.nn.GRUCell):
            return (
                ". A third of it is multiplied by the reset gate; nnx.GRUCell has no such bias, so "
                "the port needs a cell that has"
            )
        above = unit.owner.rpartition(".")[0]
        others = (x.torch for x in pairs if x.torch.shapes == unit.shapes)
        for other in others:
            if other.operation == "term" and other.owner.rpartition(".")[0] == above:
                line = f'sum = [{{term = "{unit.name}", original = "{other.name}"}}]'
                return f", or is it added to {other.name}, as in {line} ?"
        return ""

    def _alias(self, unit: Unit, pairs: Sequence[Pair], owners: dict[str, str]) -> Pair | None:
        known = information(self._flax)
        alike = {x: likeness(words(unit.name), words(x), known, known) for x in self._flax}
        return alias_of(unit, pairs, alike, owners)

    def _choices(self, pairs: list[Pair], groups: Sequence[Sequence[int]]) -> Iterator[_Choice]:
        """Yield what is not clear: which is which, in what order, and which way round.

        Layers that differ by a number get the same answer, and so do the leaves of one module.
        """
        merged: dict[tuple[object, ...], list[list[int]]] = {}
        for group in groups:
            owners = [
                tuple(template(_module(unit)) for unit in side)
                for side in zip(*((pairs[i].torch, pairs[i].flax) for i in group), strict=True)
            ]
            merged.setdefault((*map(tuple, owners),), []).append(list(group))
        for alike in merged.values():
            orders = itertools.permutations(range(len(alike[0])))
            answers = []
            for order in itertools.islice(orders, _MOST_EXCHANGES):
                made = [exchanged([pairs[i] for i in group], order) for group in alike]
                found = [pair for group in made for pair in group or ()]
                moved_places = zip((i for group in alike for i in group), found, strict=False)
                if all(x is not None for x in made) and not any(
                    is_against_names(pairs[i], pair.flax) for i, pair in moved_places
                ):
                    answers.append(tuple(found))
            if len(answers) > 1:
                yield _Choice(tuple(i for group in alike for i in group), tuple(answers))
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for place, pair in enumerate(pairs):
            shapes = pair.torch.shapes, pair.flax.shapes
            key = template(pair.torch.name), template(pair.flax.name), shapes, len(pair.fits)
            by_kind.setdefault(key, []).append(place)
        for places in by_kind.values():
            alike_pairs = [pairs[i] for i in places]
            options = [
                [dataclasses.replace(x, fits=(fit,)) for x in orders_of(pair) for fit in x.fits]
                for pair in alike_pairs
            ]
            if len(options[0]) > 1 and len({len(x) for x in options}) == 1:
                yield _Choice(tuple(places), tuple(zip(*options, strict=True)))

    def _decided(self, pairs: list[Pair], choices: list[_Choice]) -> Rules:
        """Return the rules that make the outputs equal, or else the likeliest."""
        likely = self._rules_of(pairs)
        if self._experiment is None:
            why = "there are no inputs to try them on"
            return self._unproven(likely, pairs, choices, why) if choices else likely
        try:
            gap = self._experiment.gap(self._rules_of(pairs, short=False))
        except ValueError:
            if choices:
                raise
            return likely  # the levels say what the model raises
        if gap <= _SAME_OUTPUT:
            return likely
        better, its_gap = self._searched(pairs, choices, gap) if choices else (pairs, gap)
        if its_gap > _SAME_OUTPUT:
            start = better if its_gap <= _MUCH_BETTER * gap else pairs
            other, other_gap = self._against_names(start, min(gap, its_gap))
            if other_gap <= max(_SAME_OUTPUT, _MUCH_BETTER * its_gap):
                return self._found_against_names(pairs, other, other_gap)
        if its_gap <= _NEAR_OUTPUT:
            return self._rules_of(better) if its_gap <= _MUCH_BETTER * gap else likely
        if its_gap <= _MUCH_BETTER * gap:
            rules, why = self._rules_of(better), f"the smallest gap of outputs, {its_gap:.0e}, has"
            return self._unproven(rules, better, choices, f"{why} these")
        if not choices:
            return likely
        return self._unproven(likely, pairs, choices, "none makes the outputs equal")

    def _against_names(self, pairs: list[Pair], gap: float) -> tuple[list[Pair], float]:
        """Try exchanges of what has the same shape until outputs are equal or time is up."""
        assert self._experiment is not None
        fixed = frozenset(range(len(pairs) - len(self._open), len(pairs)))
        tries, start = moves(pairs, fixed), time.monotonic()
        if not tries:
            return pairs, gap
        measure = self._experiment.strangers
        best, best_gap = pairs, gap
        least, is_better = (measure(self._rules_of(best, short=False)), gap), True
        while is_better:
            is_better = False
            for move in tries:
                if (tried := moved(best, move)) is None:
                    continue
                rules = self._rules_of(tried, short=False)
                its_gap = self._experiment.gap(rules)
                if its_gap <= _SAME_OUTPUT:
                    return tried, its_gap
                found = measure(rules), its_gap
                if found < least:
                    best, best_gap, least, is_better = tried, its_gap, found, True
                if time.monotonic() - start > _SECONDS_AGAINST_NAMES:
                    return best, best_gap
        return best, best_gap

    def _found_against_names(self, pairs: list[Pair], found: list[Pair], gap: float) -> Rules:
        """Return rules that were found by exchanges, with a note on what names say."""
        rules = self._rules_of(found)
        places = [i for i, pair in enumerate(found) if pair.flax != pairs[i].flax]
        if not places:
            return rules
        equal = "equal" if gap <= _SAME_OUTPUT else f"closest, {gap:.0e},"
        lines, exchange = self._lines(rules, found, places), ""
        note = f"outputs are {equal} with {lines}, not as names suggest"
        against = [i for i in places if is_against_names(pairs[i], found[i].flax)]
        if against:
            # Weights are moved by names where these are equal: what differs then is a difference.
            kept = [pairs[i] if i in against else pair for i, pair in enumerate(found)]
            is_whole = len({pair.flax.names for pair in kept}) == len(kept)
            note += ", and equal names are kept"
            lines = self._lines(rules, found, against)
            rules = self._rules_of(kept if is_whole else pairs)
            exchange = lines if gap <= _SAME_OUTPUT else ""
        return dataclasses.replace(rules, notes=(*rules.notes, note), exchange=exchange)

    def _searched(
        self, pairs: list[Pair], choices: list[_Choice], gap: float
    ) -> tuple[list[Pair], float]:
        """Try answers, one choice after the other, until outputs are equal or time is up."""
        assert self._experiment is not None
        start, trials = time.monotonic(), 0
        best, best_gap = pairs, gap
        total = math.prod(len(choice.answers) for choice in choices)

        def answered(
            pairs: list[Pair] | None, choice: _Choice, answer: tuple[Pair, ...]
        ) -> list[Pair] | None:
            if pairs is None:
                return None
            changed = list(pairs)
            for place, pair in zip(choice.places, answer, strict=True):
                changed[place] = pair
            names = [name for pair in changed for name in pair.flax.names]
            # Two choices about one pair may not go together.
            return changed if len(set(names)) == len(names) else None

        if total <= _MOST_TRIALS // 4:
            for answers in itertools.product(*(choice.answers for choice in choices)):
                tried: list[Pair] | None = pairs
                for choice, answer in zip(choices, answers, strict=True):
                    tried = answered(tried, choice, answer)
                if tried is None:
                    continue
                its_gap = self._experiment.gap(self._rules_of(tried, short=False))
                if its_gap < best_gap:
                    best, best_gap = tried, its_gap
                if best_gap <= _SAME_OUTPUT or time.monotonic() - start > _SECONDS:
                    break
            return best, best_gap
        order = sorted(choices, key=lambda choice: min(pairs[i].torch.order for i in choice.places))
        measure = self._experiment.strangers
        least = measure(self._rules_of(best)), best_gap
        for choice in (*order, *order):
            for answer in choice.answers[1:]:
                if (tried := answered(best, choice, answer)) is None:
                    continue
                rules, trials = self._rules_of(tried, short=False), trials + 1
                found = measure(rules), self._experiment.gap(rules)
                if found < least:
                    best, best_gap, least = tried, found[1], found
                late = time.monotonic() - start > _SECONDS or trials > _MOST_TRIALS
                if best_gap <= _SAME_OUTPUT or late:
                    return best, best_gap
        return best, best_gap

    def _unproven(self, rules: Rules, pairs: list[Pair], choices: list[_Choice], why: str) -> Rules:
        """Return rules with a note on what was chosen without proof."""
        unclear = [i for choice in choices if choice.is_open for i in choice.places]
        if not unclear:
            return rules
        note = f"by names and order, not proven: {self._lines(rules, pairs, unclear)}; {why}"
        return dataclasses.replace(rules, notes=(*rules.notes, note))

    def _lines(self, rules: Rules, pairs: list[Pair], places: Sequence[int]) -> str:
        """Return the rules of some pairs, as lines of a file."""
        by_leaf = {
            name: rule
            for rule in rules.rules
            for link in rule.links(self._torch, "torch", self._flax)
            for name in link.torch
        }
        lines = list(dict.fromkeys(as_line(by_leaf[pairs[i].torch.name]) for i in places))
        more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
        return f"{'  '.join(lines[:6])}{more}"


def _definition(module: nnx.Module, name: str) -> list[int]:
    """Return a key that sorts leaves as they are defined, for flax sorts them by name."""
    node: object = module
    key = []
    for step in name.split("."):
        if isinstance(node, nnx.List) and step.isdigit():
            key.append(int(step))
            node = node[int(step)]
        else:
            held = list(getattr(node, "__dict__", ()))
            key.append(held.index(step) if step in held else len(held))
            node = getattr(node, step, None)
    return key


def _module(unit: Unit) -> str:
    """Return the path of the module that a unit lies in."""
    return unit.owner if unit.leaf.is_known else unit.name.rpartition(".")[0]


def _ties(module: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    """Return (alias, original) for torch leaves that are one tensor under a second name."""
    first: dict[tuple[int, torch.Size], str] = {}
    ties = []
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() and key in first:
            ties.append((name, first[key]))
        first.setdefault(key, name)
    return tuple(ties)


def _missing(framework: str, unit: Unit, others: Sequence[Unit]) -> str:
    """Describe a unit without a counterpart, and ask for one by a line of a rules file."""
    other = "flax" if framework == "torch" else "torch"
    near = [x for x in others if x.size == unit.size and is_needed(x)]
    shapes = [f"{x.name} {list(x.shapes[0])}" for x in near[:3]]
    named = f" ({', '.join(shapes)} has no way to be it)" if near else ""
    line = ""
    if near:
        ours, theirs = (unit, near[0]) if framework == "torch" else (near[0], unit)
        line = as_line(Rule(ours.name, theirs.name, ""))
    more = f" and {len(unit.names) - 1} more" if len(unit.names) > 1 else ""
    return (
        f"{other} has nothing for {framework} {unit.name}{more} {list(unit.shapes[0])}{named}"
        + (f", or is it {line} ?" if line else "")
    )

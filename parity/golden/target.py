"""The module that a command line names, in the only framework that it needs."""

from parity.frameworks.handle import handle
from parity.system.import_target import built, load_attribute


def build_module(framework: str, target: str, seed: int) -> object:
    """Return the module that a target such as `net.py:build` stands for.

    Args:
        framework: flax or torch.
        target: a module, or a function that builds one.
        seed: of torch's own generator while it is built.

    Raises:
        ValueError: for a target that gives no module of the framework.
    """
    here = handle(framework)
    found = here.seeded(seed, lambda: built(target, load_attribute(target), (here.MODULE,)))
    if not isinstance(found, here.MODULE):
        raise ValueError(
            f"{target}: {type(found).__name__}. --{framework} wants a {framework} module or a "
            "function that builds one. Name one."
        )
    return found

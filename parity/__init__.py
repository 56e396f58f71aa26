"""Proves that a Flax NNX model and a PyTorch model are the same function, or says where they part.

    from parity.check import check
    from parity.corpus import Corpus
    from parity.twins import twins

    report = check(twins(Corpus.load()))
    report.verdict, report.divergence

Nothing is imported here, so that `parity --help` does not wait for two frameworks.
"""

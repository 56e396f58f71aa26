"""What is compared: two models and the inputs that put their equality to the test.

pair.py    Pair: two specs, rules, probes and training batches
inputs.py  a user's inputs as probes and training batches
text.py    Corpus: text in, token batches out
"""

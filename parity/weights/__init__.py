"""Which leaf of one model is which of the other, and moving weights between them.

layouts.py       how a leaf of one framework lies in the other: Layout, Link
rules.py         the weight map as data: Rule, Rules, rules files
tables.py        the rules of known pairs: the twins, their classifiers, transformers' GPT-2
weight_map.py    rules resolved for two models, or every problem at once: WeightMap, resolve
known_layers.py  the frameworks' own layers: how their leaves lie, what each does alone
modules.py       which module is which, by the weights below it
names.py         how alike two module paths are
infer.py         rules for two modules from types, shapes, names and experiment
compress.py      links as rules with stars for the numbers of layers
transplant.py    move weights from one live model into the other
convert.py       move weights from one file into another
randomize.py     random weights in which every leaf matters
"""

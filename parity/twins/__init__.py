"""The two GPTs as the harness uses them, each by one handle, and both as one pair.

twin      what the two handles have in common, as Protocols
flax      the handle of flax_gpt
torch     the handle of torch_gpt
state     leaves and training states by name, for both handles
both      both handles with the same weights
names     what there is to choose from; imports nothing
pair      both twins as a Pair for a check, with probes cut from a text
companions  tiny models that are checked beside it
follow    a plan of cache operations carried out on a twin
"""

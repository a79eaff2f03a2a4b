"""``python -m fusedrnn demo``: one character language model, trained with torch.nn and fusedrnn.

Both start from the same weights and see the same batches, in turns, so that their perplexities can
be compared figure by figure and their speeds are measured under the same load of the machine.
"""

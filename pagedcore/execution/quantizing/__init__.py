"""Make a checkpoint of few bits from one of 16: what `pagedcore quantize` does.

writer.py       what a format must do to be written
layers.py       which tensors a model multiplies with, learned by building it
calibration.py  what goes into each layer while the model reads a text
balance.py      scales that move rounding errors away from inputs that are large
shards.py       the files, each written whole or not at all
job.py          all of it, from a folder to a folder
"""
